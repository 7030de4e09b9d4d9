"""Pictures in a folder or a zip, in a fixed order: by their paths, folder by folder."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np

from datamodules.pictures import SUFFIXES


class Files:
    """The pictures below `path`, a folder or a zip; `names` are relative to it, or to a zip's only folder.

    Files of other kinds and hidden ones are left out. `only` picks among the names.

    Errors: FileNotFoundError where there are no pictures, OSError for a damaged zip.
    """

    def __init__(self, path: Path, only: Callable[[str], bool] = lambda name: True):
        self.path = path
        self._zip = None if path.is_dir() else open_zip(path)
        sizes = _in_folder(path) if self._zip is None else {i.filename: i.file_size for i in self._zip.infolist()}
        places = {place: PurePosixPath(place).parts for place in sizes if _is_picture(place)}
        root = _common_folder(list(places.values())) if self._zip else 0
        chosen = sorted((parts[root:], place) for place, parts in places.items() if only("/".join(parts[root:])))
        if not chosen:
            raise FileNotFoundError(f"{path} holds no pictures of the kinds {' '.join(SUFFIXES)}; set data.path")
        self.names = ["/".join(parts) for parts, _ in chosen]
        self._places = [place for _, place in chosen]
        self.sizes = [sizes[place] for place in self._places]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def identity(self) -> str:
        """A hash (hex) of names and sizes, in their order."""
        digest = sha256()
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\0{size}\n".encode())
        return digest.hexdigest()

    def contents(self, start: int = 0) -> Iterator[tuple[str, bytes]]:
        """(what errors call it, content) of each picture from number `start` on."""
        for place in self._places[start:]:
            if self._zip is None:
                yield str(self.path / place), (self.path / place).read_bytes()
            else:
                try:
                    yield f"{place} in {self.path}", read_member(self._zip, place)
                except zipfile.BadZipFile as error:
                    raise OSError(f"{place} in {self.path} is damaged ({error}); copy or make the zip again") from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """Errors: OSError for what is no zip, or is cut short."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise OSError(f"{path} is damaged or cut short ({error}); copy or make it again") from error


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Errors: zipfile.BadZipFile for any damage."""
    try:
        return archive.read(name)
    except (zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise zipfile.BadZipFile(f"{name}: {error}") from error


def is_edm_zip(path: Path) -> bool:
    """Whether `path` is a zip of EDM's dataset_tool, which always has a dataset.json."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return False
    with open_zip(path) as archive:
        return "dataset.json" in archive.namelist()


def folder_classes(files: Files, classes: int) -> np.ndarray:
    """The class of each picture, int64 (N,): the place of its first folder among all first folders in order, as EDM's.

    Errors: ValueError for pictures outside of such folders, or another number of folders.
    """
    way_out = "or set data.num_classes=0"
    loose = next((name for name in files.names if "/" not in name), None)
    if loose is not None:
        raise ValueError(
            f"{loose} in {files.path} lies in no class folder, data.num_classes={classes}; move it {way_out}"
        )
    folders = [name.partition("/")[0] for name in files.names]
    found = sorted(set(folders))
    if len(found) != classes:
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ValueError(
            f"{files.path} has {len(found)} class folders with pictures ({listed}), data.num_classes={classes}; "
            f"complete the folder, correct the option {way_out}"
        )
    return np.searchsorted(np.array(found), np.array(folders)).astype(np.int64)


def _in_folder(path: Path) -> dict[str, int]:
    sizes = {}
    for folder, _, names in os.walk(path, followlinks=True):
        for name in names:
            file = os.path.join(folder, name)
            if name.lower().endswith(SUFFIXES):
                sizes[os.path.relpath(file, path)] = os.stat(file).st_size
    return sizes


def _is_picture(place: str) -> bool:
    parts = PurePosixPath(place).parts
    return place.lower().endswith(SUFFIXES) and not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _common_folder(places: list[tuple[str, ...]]) -> int:
    """1 where all pictures lie in one folder, as in a zip of a folder, else 0."""
    return int(bool(places) and len({parts[0] for parts in places}) == 1 and all(len(parts) > 1 for parts in places))

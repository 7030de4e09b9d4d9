"""Pictures in a folder or a zip, in a fixed order: by their paths, folder by folder."""

import json
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datamodules.components.picture_decoding import FACTOR, SUFFIXES
from stillhouse.checkpoints.bounds import read_zipped
from stillhouse.ranks import progress_bar


def json_hash(*parts: object) -> str:
    """SHA-256 (hex) of values that JSON can represent."""
    return sha256(json.dumps(parts).encode()).hexdigest()


class PictureSequence(ABC):
    """Encoded pictures in a fixed order.

    Attributes:
        path: Of the file or folder that holds them.
        sizes: Bytes of each picture, or one upper bound of the sum.
        identity: A hash (hex) of what can be known without reading them; while it is the same, killed work is continued.
    """

    path: Path
    sizes: list[int]
    identity: str

    def __init__(self, count: int):
        self._checks = np.zeros(count, "<u4")
        self._checked = np.zeros(count, bool)

    def __len__(self) -> int:
        return len(self._checks)

    @abstractmethod
    def content_hashes(self) -> dict[str, Callable[[], str]]:
        """The hashes of what the sequence consists of, in words, the cheap ones first."""

    def report(self, name: str) -> None:  # noqa: B027, most sequences use everything
        """Print a line for the data set `name` on what lies at the path and is not used, if there is anything."""

    @abstractmethod
    def _read(self, start: int) -> Iterator[tuple[str, bytes]]:
        """(what errors call it, content) of each picture from number `start` on."""

    def contents(self, start: int = 0) -> Iterator[tuple[str, bytes]]:
        """(what errors call it, content) of each picture from number `start` on."""
        for number, (where, content) in enumerate(self._read(start), start):
            self._checks[number], self._checked[number] = zlib.crc32(content), True
            yield where, content

    def content_hash(self) -> str:
        """SHA-256 (hex) of the CRC-32 of every picture; those that have not been read yet are read now."""
        unread = int(np.count_nonzero(~self._checked))  # the first ones, where work was continued in the middle
        if unread:
            with progress_bar(unread, f"reading {self.path}") as bar:
                for _ in islice(self.contents(), unread):
                    bar.update()
        return sha256(self._checks.tobytes()).hexdigest()


class PictureFiles(PictureSequence):
    """The pictures in a folder or a zip, in the order of their paths; hidden files are left out.

    Args:
        path: The folder or zip.
        only: Whether a picture is used, by its name.

    Attributes:
        names: Paths of the pictures, relative to `path` or to a zip's only folder.
        others: Paths of the files that are no pictures by their names.
        file_count: Number of files, pictures or not.
        passed_over: Links to a folder that contains them.

    Raises:
        FileNotFoundError: There are no pictures.
        OSError: A damaged zip, or a link to nothing.
        ValueError: A zip that holds a name twice.
    """

    def __init__(self, path: Path, only: Callable[[str], bool] = lambda name: True):
        self.path = path
        self.passed_over: list[str] = []
        self._zip = None if path.is_dir() else open_zip(path)
        known: dict[str, tuple[int, int]] = {}  # by place: size, and a zip's CRC-32 or a folder's time of change
        if self._zip is None:
            stats, self.passed_over = files_below(path)
            known = {place: (stat.st_size, stat.st_mtime_ns) for place, stat in stats.items()}
        else:
            known = {name: (info.file_size, info.CRC) for name, info in members(self._zip, path).items()}
        places = {place: PurePosixPath(place).parts for place in known if not _is_hidden(place)}
        files = [place for place in places if not place.endswith("/")]
        self.file_count = len(files)
        self.others = sorted(place for place in files if not place.lower().endswith(SUFFIXES))
        places = {place: parts for place, parts in places.items() if place.lower().endswith(SUFFIXES)}
        root = _common_folder(list(places.values())) if self._zip else 0
        chosen = sorted((parts[root:], place) for place, parts in places.items() if only("/".join(parts[root:])))
        if not chosen:
            raise FileNotFoundError(f"{path} holds no pictures of the kinds {' '.join(SUFFIXES)}; set data.path")
        super().__init__(len(chosen))
        self.names = ["/".join(parts) for parts, _ in chosen]
        self._places = [place for _, place in chosen]
        self.sizes = [known[place][0] for place in self._places]
        self.identity = json_hash([(name, *known[place]) for name, (_, place) in zip(self.names, chosen, strict=True)])
        if self._zip is not None:
            self._checks[:] = [known[place][1] for place in self._places]
            self._checked[:] = True

    def content_hashes(self) -> dict[str, Callable[[], str]]:
        return {"names": lambda: json_hash(self.names), "pictures": self.content_hash}

    def report(self, name: str) -> None:
        for link in self.passed_over:
            print(f"{name}: passed over {link}, a link to a folder that it lies in", flush=True)
        if self.others:
            print(
                f"{name}: {len(self.others):,} of {self.file_count:,} files are no pictures by their names and left out, "
                f"the first {self.others[0]}",
                flush=True,
            )

    def _read(self, start: int) -> Iterator[tuple[str, bytes]]:
        for place in self._places[start:]:
            if self._zip is None:
                yield str(self.path / place), (self.path / place).read_bytes()
            else:
                try:
                    yield f"{place} in {self.path}", read_member(self._zip, place)
                except zipfile.BadZipFile as error:
                    raise OSError(f"{place} in {self.path} is damaged ({error}); copy or make the zip again") from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip; OSError for what is no zip, or is cut short."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise OSError(f"{path} is damaged or cut short ({error}); copy or make it again") from error


def read_member(archive: zipfile.ZipFile, name: str, factor: int = FACTOR) -> bytes:
    """The content of a file in a zip.

    Raises:
        zipfile.BadZipFile: The zip is damaged, or the content is more than `factor` times its packed size.
    """
    try:
        return read_zipped(archive, name, factor=factor)
    except (OSError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise zipfile.BadZipFile(f"{name}: {error}") from error


def members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their names; ValueError for a name that is there twice."""
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in infos:
            raise ValueError(f"{path} holds {info.filename} twice; make the zip again")
        infos[info.filename] = info
    return infos


def is_edm_zip(path: Path) -> bool:
    """Whether `path` is a zip of EDM's dataset_tool, which always has a dataset.json."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return False
    with open_zip(path) as archive:
        return "dataset.json" in archive.namelist()


CLASS_ORDERS = ("text", "natural")


def class_folders(files: PictureFiles, classes: int, order: str = "text") -> list[str]:
    """The first folders of the pictures, whose places in the list are the classes.

    Args:
        files: The pictures.
        classes: How many folders there must be.
        order: text sorts the names as text, as EDM does; natural by the numbers in them.

    Raises:
        ValueError: A picture lies in no such folder, or there is another number of folders.
    """
    way_out = "or set data.num_classes=0"
    loose = next((name for name in files.names if "/" not in name), None)
    if loose is not None:
        raise ValueError(
            f"{loose} in {files.path} lies in no class folder, data.num_classes={classes}; move it {way_out}"
        )
    folders = sorted({name.partition("/")[0] for name in files.names}, key=_natural if order == "natural" else None)
    if len(folders) != classes:
        raise ValueError(
            f"{files.path} has {len(folders)} class folders with pictures ({shortened(folders)}), data.num_classes={classes}; "
            f"complete the folder, correct the option {way_out}"
        )
    return folders


def folder_classes(files: PictureFiles, folders: list[str]) -> np.ndarray:
    """The class of each picture, int64 (N,), which is the place of its first folder in `folders`."""
    places = {folder: place for place, folder in enumerate(folders)}
    return np.array([places[name.partition("/")[0]] for name in files.names], np.int64)


def class_table(folders: list[str], orders: bool = False) -> str:
    """A line on the first folders and their classes; with `orders` also on how data.class_order would change them."""
    text = "classes by folder: " + shortened([f"{folder} -> {place}" for place, folder in enumerate(folders)], 10)
    for order, key in (("text", None), ("natural", _natural)):
        if orders and (other := sorted(folders, key=key)) != folders:
            text += f" (data.class_order={order} counts {shortened(other)})"
    return text


def shortened(items: Iterable[str], count: int = 3) -> str:
    """The first `count` of the items, and "..." where there are more."""
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def _natural(name: str) -> tuple[Any, ...]:
    """A key that sorts 10 behind 2: text and numbers in turn."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def files_below(path: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """The stat of each file below a folder, by its relative path, and the links to a folder that contains them.

    Those links are not followed, all others are; hidden files and folders are left out.

    Raises:
        OSError: A folder can't be read.
        FileNotFoundError: A link leads to nothing.
    """
    files: dict[str, os.stat_result] = {}
    loops: list[str] = []

    def walk(folder: str, around: tuple[tuple[int, int], ...]) -> None:
        with os.scandir(path / folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if _is_hidden(entry.name):
                    continue
                place = os.path.join(folder, entry.name)
                try:
                    stat = entry.stat()
                except FileNotFoundError as error:
                    way_out = "repair or remove the link"
                    raise FileNotFoundError(f"{path / place} leads to nothing; {way_out}") from error
                if not entry.is_dir():
                    files[place] = stat
                elif (here := (stat.st_dev, stat.st_ino)) in around:
                    loops.append(str(path / place))
                else:
                    walk(place, (*around, here))

    walk("", tuple((stat.st_dev, stat.st_ino) for stat in map(os.stat, (path, *path.resolve().parents))))
    return files, loops


def _is_hidden(place: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(place).parts)


def _common_folder(places: list[tuple[str, ...]]) -> int:
    """1 where all pictures are in one folder, as in a zip of a folder, else 0."""
    return int(bool(places) and len({parts[0] for parts in places}) == 1 and all(len(parts) > 1 for parts in places))

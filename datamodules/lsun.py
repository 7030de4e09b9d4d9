"""LSUN: the LMDB export of a category, or its pictures in a folder or zip; packed as the encoded bytes."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from datamodules.encoded import EncodedImages, pack_encoded
from datamodules.files import Files
from datamodules.sources import FileDataModule
from metrics.ranks import progress_bar


class LSUN(FileDataModule):
    """Pictures of one category, of which the middle square is shown; no classes.

    `path`: a folder with data.mdb (as bedroom_train_lmdb), in the order of its keys, or any folder or zip of pictures. They
    stay encoded, for raw they would take ten times the space: `num_workers` processes decode them.
    """

    packed_type = EncodedImages
    get = "get it by LSUN's download.py, unpack it and set data.path"

    def convert(self, folder: Path) -> None:
        if self.classes:
            raise ValueError(
                f"data.num_classes={self.classes}: a category of LSUN has no classes; set data.num_classes=0"
            )
        if self.path.is_dir() and (self.path / "data.mdb").is_file():
            pictures: LMDB | Files = LMDB(self.path)
        else:
            pictures = Files(self.path)

        def contents(start: int) -> Iterator[tuple[str, bytes]]:
            with progress_bar(len(pictures) - start, f"packing {self.path}") as bar:
                for one in pictures.contents(start):
                    yield one
                    bar.update()

        pack_encoded(
            folder,
            contents,
            len(pictures),
            sum(pictures.sizes),
            self.resolution,
            meta={
                "name": self.name,
                "classes": 0,
                "source": f"{self.path.name}, {len(pictures)} encoded pictures, list {pictures.identity[:16]}",
            },
            identity=pictures.identity,
        )


class LMDB:
    """The values of an LMDB folder in the order of their keys. `sizes` is one upper bound of all: reading each takes hours.

    Errors: OSError for a damaged or empty one, ImportError's like where the lmdb package is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._environment() as environment:
            self._count = environment.stat()["entries"]
        if not self._count:
            raise OSError(f"{path} holds no pictures; unpack it again or set data.path")
        self.sizes = [(path / "data.mdb").stat().st_size]

    def __len__(self) -> int:
        return self._count

    @property
    def identity(self) -> str:
        """A hash (hex) of the number of values, of the size of the file, and of the first and last keys and values."""
        digest = sha256(f"{self._count} {self.sizes[0]}".encode())
        with self._environment() as environment, environment.begin() as transaction:
            cursor = transaction.cursor()
            for move in (cursor.first, cursor.last):
                move()
                digest.update(cursor.key() + cursor.value())
        return digest.hexdigest()

    def contents(self, start: int = 0) -> Iterator[tuple[str, bytes]]:
        """(what errors call it, content) of each value from number `start` on."""
        with self._environment() as environment, environment.begin() as transaction:
            cursor = transaction.cursor()
            for number, key in enumerate(cursor.iternext(keys=True, values=False)):
                if number >= start:
                    yield f"{key.decode(errors='replace')} in {self.path}", cursor.value()

    def _environment(self) -> Any:
        try:
            import lmdb  # needed once
        except ImportError:
            raise ValueError(f"reading {self.path} needs the lmdb package; run `pip install -e '.[lsun]'`") from None
        try:
            return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            raise OSError(f"{self.path} is damaged ({error}); unpack it again") from error

"""LSUN: the LMDB export of a category, or its pictures in a folder or zip; packed as the encoded bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from datamodules.encoded import EncodedImages, pack_encoded
from datamodules.files import Files, Pictures
from datamodules.sources import Hashes, PictureDataModule
from datamodules.storage import readable
from metrics.ranks import progress_bar


class LSUN(PictureDataModule):
    """Pictures of one category, of which the middle square is shown; no classes.

    `path`: a folder with data.mdb (as bedroom_train_lmdb), in the order of its keys, or any folder or zip of pictures. They
    stay encoded, for raw they would take ten times the space: `num_workers` processes decode them.
    """

    packed_type = EncodedImages
    get = "get it by LSUN's download.py, unpack it and set data.path"

    @property
    def places(self) -> list[Path]:
        return [self.path / "data.mdb"] if self._is_lmdb else [self.path]  # its lock file is written by who reads

    @property
    def _is_lmdb(self) -> bool:
        return self.path.is_dir() and (self.path / "data.mdb").is_file()

    def pictures(self) -> "LMDB | Files":
        return LMDB(self.path) if self._is_lmdb else Files(self.path)

    def hashes(self) -> Hashes:
        return self.pictures().hashes()

    def convert(self, folder: Path) -> None:
        if self.classes:
            raise ValueError(
                f"data.num_classes={self.classes}: a category of LSUN has no classes; set data.num_classes=0"
            )
        stamp, pictures = self.stamp(), self.pictures()

        def contents(start: int) -> Iterator[tuple[str, bytes]]:
            pictures.report(self.name)
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
                "source": f"{self.path.name}, {len(pictures)} encoded pictures",
            },
            rules=self.rules,
            identity=pictures.identity,
            provenance=lambda: self.provenance(stamp, pictures.hashes()),
        )


class LMDB(Pictures):
    """The values of an LMDB folder in the order of their keys. `sizes` is one upper bound of all: reading each takes hours.

    Errors: OSError for a damaged or empty one, ValueError where the lmdb package is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._reading() as environment:
            used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            count = environment.stat()["entries"]
        if not count:
            raise OSError(f"{path} holds no pictures; unpack it again or set data.path")
        super().__init__(count)
        self.sizes = [used]  # the file may be sparse and much larger

    @property
    def identity(self) -> str:
        """Of the number of values, of the pages in use, and of the first and last keys and values."""
        digest = sha256(f"{len(self)} {self.sizes[0]}".encode())
        with self._reading() as environment, environment.begin() as transaction:
            cursor = transaction.cursor()
            for move in (cursor.first, cursor.last):
                move()
                digest.update(cursor.key() + cursor.value())
        return digest.hexdigest()

    def hashes(self) -> Hashes:
        return {"number of pictures": lambda: str(len(self)), "pictures": self.content_hash}

    def report(self, name: str) -> None:
        """Nothing of it is left out."""

    def _read(self, start: int) -> Iterator[tuple[str, bytes]]:
        with self._reading() as environment, environment.begin() as transaction:
            cursor = transaction.cursor()
            number = -1
            for number, key in enumerate(cursor.iternext(keys=True, values=False)):
                if number >= start:
                    yield f"{key.decode(errors='replace')} in {self.path}", cursor.value()
        if number + 1 != len(self):
            raise OSError(f"{self.path} is damaged (it holds {number + 1} of {len(self)} values); unpack it again")

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """The environment; errors of the library in one line, also those from the block."""
        try:
            import lmdb  # needed once
        except ImportError:
            raise ValueError(f"reading {self.path} needs the lmdb package; run `pip install -e '.[lsun]'`") from None
        try:
            with lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, create=False) as environment:
                needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
                size = (self.path / "data.mdb").stat().st_size
                if size < needed:  # reading a page that is not there would end the process
                    raise OSError(
                        f"{self.path} is cut short (data.mdb has {readable(size)} of {readable(needed)}); unpack it again"
                    )
                yield environment
        except lmdb.Error as error:
            raise OSError(f"{self.path} is damaged ({error}); unpack it again") from error

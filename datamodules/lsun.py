"""LSUN: the LMDB export of a category, or its pictures in a folder or zip; packed as the encoded bytes."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datamodules.components.disk_space import readable
from datamodules.components.file_datamodule import ContentHashes, EncodedDataModule
from datamodules.components.picture_files import PictureFiles, PictureSequence, json_hash


class LSUN(EncodedDataModule):
    """The pictures of one category, of each the middle square, without classes.

    They stay encoded, because as pixels they would take ten times the space; `num_workers` processes decode them.

    Args:
        path: A folder with data.mdb (such as bedroom_train_lmdb), in the order of its keys, or any folder or zip of pictures.
    """

    how_to_get = "get it by LSUN's download.py, unpack it and set data.path"

    @property
    def source_paths(self) -> list[Path]:
        return [self.path / "data.mdb"] if self._is_lmdb else [self.path]  # readers write its lock file

    @property
    def _is_lmdb(self) -> bool:
        return self.path.is_dir() and (self.path / "data.mdb").is_file()

    def pictures(self) -> "LMDB | PictureFiles":
        return LMDB(self.path) if self._is_lmdb else PictureFiles(self.path)


class LMDB(PictureSequence):
    """The values of an LMDB folder in the order of their keys.

    `sizes` holds one upper bound of the sum, because to read each size takes hours. The values are read in another process: in
    a damaged file the library can run into pages that are not there, which ends the process.

    Raises:
        OSError: The folder is damaged or empty.
        ValueError: The lmdb package is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        with _opened(path) as environment:
            used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            count, transactions = environment.stat()["entries"], environment.info()["last_txnid"]
        if not count:
            raise OSError(f"{path} holds no pictures; unpack it again or set data.path")
        super().__init__(count)
        self.sizes = [used]  # the file may be sparse and much larger
        self.identity = json_hash(count, used, transactions, (path / "data.mdb").stat().st_mtime_ns)

    def content_hashes(self) -> ContentHashes:
        return {"number of pictures": lambda: str(len(self)), "pictures": self.content_hash}

    def _read(self, start: int) -> Iterator[tuple[str, bytes]]:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        reader = context.Process(target=_send_values, args=(self.path, start, receiver, sender))
        reader.start()
        sender.close()
        number = start
        try:
            while True:
                key, value = receiver.recv()
                if key is None:
                    break
                if number == len(self):
                    raise OSError(f"{self.path} is damaged (it holds more than {number} values); unpack it again")
                yield f"{key.decode(errors='replace')} in {self.path}", value
                number += 1
        except EOFError:
            reader.join()
            raise OSError(
                f"{self.path} is damaged (reading it ended a process with code {reader.exitcode}); unpack it again"
            ) from None
        finally:
            receiver.close()  # the reader ends at what it sends next
            reader.join()
        if value is not None:
            raise value
        if number != len(self):
            raise OSError(f"{self.path} is damaged (it holds {number} of {len(self)} values); unpack it again")


def _send_values(path: Path, start: int, receiver: Connection, sender: Connection) -> None:
    """Send (key, value) of each value from number `start` on, then (None, the error that ended it, or None)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent process, whose end also ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    receiver.close()  # while it is open here, a closed pipe goes unnoticed
    with suppress(BrokenPipeError):  # the parent needs no more
        try:
            with _opened(path) as environment, environment.begin() as transaction:
                cursor = transaction.cursor()
                for number, key in enumerate(cursor.iternext(keys=True, values=False)):
                    if number >= start:
                        sender.send((key, cursor.value()))
            sender.send((None, None))
        except BrokenPipeError:
            raise
        except OSError as error:
            sender.send((None, error))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield the environment, and turn the library's errors into one line, also those of the block."""
    try:
        import lmdb  # needed once
    except ImportError:
        raise ValueError(f"reading {path} needs the lmdb package; run `pip install -e '.[lsun]'`") from None
    try:
        with lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False) as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            size = (path / "data.mdb").stat().st_size
            if size < needed:
                raise OSError(
                    f"{path} is cut short (data.mdb has {readable(size)} of {readable(needed)}); unpack it again"
                )
            yield environment
    except lmdb.Error as error:
        raise OSError(f"{path} is damaged ({error}); unpack it again") from error

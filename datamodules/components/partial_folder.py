"""Folders that are filled step by step, by one process at a time, and continued where a killed process stopped."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datamodules.components.disk_space import named_if_full
from stillhouse.checkpoints.block_hashes import BLOCK, BlockHashes
from stillhouse.checkpoints.bounds import parse_json
from stillhouse.file_locks import wait_for_lock
from stillhouse.files import write_json

SAVE_SECONDS = 10.0
"""Time between two records of the progress: a killed process loses no more work."""

_PROGRESS, _LOCK = "progress.json", "lock"

Blocks = Callable[[int], Iterable[tuple[int, dict[str, Any]]]]
"""From an item on: (number of items, the bytes that they add to each file, by its name)."""


@contextmanager
def claim_folder(folder: Path) -> Iterator[Path | None]:
    """Yield the partial folder beside `folder`, for the block to fill, and rename it at the end; None where `folder` exists.

    One process has it at a time; another one waits here until the first has finished or ended. An error removes it; a killed or
    interrupted process leaves it to the next one.

    Raises:
        OSError: The disk has no file locks, or fills up.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    lock = None
    while lock is None and not folder.is_dir():
        partial.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the other process has renamed or removed the folder
            message = f"{folder}: another process makes it, waiting"
            lock = wait_for_lock(partial / _LOCK, message, "set data.root to another")
    if lock is None:
        yield None
        return
    try:
        if folder.is_dir():  # finished before the lock was free
            shutil.rmtree(partial)
            yield None
            return
        with named_if_full(folder):
            yield partial
            os.rename(partial, folder)
        (folder / _LOCK).unlink(missing_ok=True)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


class _GrowingFile:
    """A file to append to, and the hashes of what follows its header."""

    def __init__(self, path: Path, header: bytes):
        self.path, self.header = path, header
        self.hashes = BlockHashes()
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")

    def begin(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(self.header)
        self.hashes = BlockHashes()

    def resume(self, size: int, digest: str) -> bool:
        """Go on after `size` bytes if their SHA-256 is `digest`; they are read again, because a crash may have lost them."""
        self._file.seek(0)
        if self._file.read(len(self.header)) != self.header:
            return False
        while self.hashes.size < size and (block := self._file.read(min(size - self.hashes.size, BLOCK))):
            self.hashes.update(block)
        if (self.hashes.size, self.hashes.whole) != (size, digest):
            return False
        self._file.seek(len(self.header) + size)
        self._file.truncate()
        return True

    def append(self, data: bytes | memoryview) -> None:
        # Written, not mapped: on a full disk a write raises OSError, whereas a store to a mapped page kills the process.
        data = memoryview(data).cast("B")
        self.hashes.update(data)
        self._file.write(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def append_resumably(
    partial: Path, headers: dict[str, bytes], identity: str | None, blocks: Blocks
) -> dict[str, BlockHashes]:
    """Write files in the `partial` folder, each its header and then what `blocks` adds.

    Work recorded under the same `identity` is continued, once its bytes have been compared with the record; any other begins
    anew.

    Args:
        partial: The folder, as `claim_folder` yields it.
        headers: The first bytes of each file, by its name.
        identity: Names source and options; None: progress is not recorded.
        blocks: Gives what is appended.

    Returns:
        The hashes of what follows the header in each file.
    """
    for path in partial.iterdir():
        if path.name not in (_PROGRESS, _LOCK, *headers):
            path.unlink()
    files = {name: _GrowingFile(partial / name, header) for name, header in headers.items()}
    try:
        done = _resumed(partial / _PROGRESS, files, identity)
        if done:
            print(f"{partial}: going on after {done:,} images", flush=True)
        else:
            for file in files.values():
                file.begin()
        saved = time.monotonic()
        for items, data in blocks(done):
            for name, part in data.items():
                files[name].append(part)
            done += items
            if identity is not None and time.monotonic() - saved >= SAVE_SECONDS:
                _record_progress(partial / _PROGRESS, files, identity, done)
                saved = time.monotonic()
        for file in files.values():
            file.sync()
        (partial / _PROGRESS).unlink(missing_ok=True)
        return {name: file.hashes for name, file in files.items()}
    finally:
        for file in files.values():
            file.close()


def _record_progress(path: Path, files: dict[str, _GrowingFile], identity: str, done: int) -> None:
    for file in files.values():
        file.sync()  # the record must never be ahead of the bytes
    written = {name: [file.hashes.size, file.hashes.whole] for name, file in files.items()}
    write_json(path, {"identity": identity, "images": done, "files": written}, sort_keys=True)


def _resumed(path: Path, files: dict[str, _GrowingFile], identity: str | None) -> int:
    """The number of images that are there already; 0 where nothing can be continued."""
    try:
        record = parse_json(path.read_bytes())
        if record["identity"] != identity or set(record["files"]) != set(files):
            return 0
        return record["images"] if all(file.resume(*record["files"][name]) for name, file in files.items()) else 0
    except (OSError, ValueError, TypeError, KeyError):  # none, or cut short
        return 0

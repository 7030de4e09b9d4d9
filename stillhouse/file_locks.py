"""Locks on files, which one process at a time holds: who trains a run, runs a search, packs a data set, uses a GPU."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def try_lock(path: Path, way_out: str | None = None) -> FileLock | None:
    """The lock of the file `path`, unless another process holds it; the file is made where it is absent, and stays.

    The operating system frees the lock of a killed process. It holds between machines as far as a shared folder has locks.

    Args:
        path: The lock's file, in a folder that exists, and of no other use: its content may be cut off.
        way_out: What to do where the disk has no locks, for the error. None: go on there without one.

    Returns:
        The lock, held until its `release()` or the end of the process; None where another process has it.

    Raises:
        OSError: The disk has no locks and `way_out` is given, or the file can't be opened.
    """
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if way_out is not None:
            reason = os.strerror(error.errno)
            raise OSError(f"{path.parent} lies on a disk without file locks ({reason}); {way_out}") from error
    return lock


@contextmanager
def hold_lock(path: Path, refusal: Exception, way_out: str | None = None) -> Iterator[None]:
    """Hold the lock of the file `path` inside the block; see `try_lock`.

    Args:
        refusal: What is raised where another process has the lock.

    Raises:
        OSError: As `try_lock`.
    """
    lock = try_lock(path, way_out)
    if lock is None:
        raise refusal
    try:
        yield
    finally:
        lock.release()


def wait_for_lock(path: Path, message: str, way_out: str | None = None) -> FileLock:
    """As `try_lock`, but where another process has the lock, print `message` once and wait until it is free.

    Raises:
        OSError: As `try_lock`; FileNotFoundError where the folder of `path` goes while this process waits.
    """
    lock = try_lock(path, way_out)
    if lock is None:
        print(message, flush=True)
        lock = _lock(path)
        lock.acquire()
    return lock


def _lock(path: Path) -> FileLock:
    # Without flock, filelock would leave marker files, which a kill on another machine makes permanent.
    return FileLock(path, fallback_to_soft=False)

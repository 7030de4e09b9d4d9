"""Disk space: how much is needed and free, and errors that name the file for which it was not enough."""

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_if_full(path: Path) -> Iterator[None]:
    """Let the error of a disk that fills up while the block writes name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = os.strerror(error.errno)
        raise OSError(f"{reason}: {path} was not written, nothing of it is left; free space and run again") from error


def readable(size: float) -> str:
    """A number of bytes in a unit that suits it: 1.3 GB."""
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_space(folder: Path) -> int:
    """The free bytes on the disk where `folder` is or will be."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def folder_size(folder: Path) -> int:
    """The bytes of the files directly in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError where the disk of `folder` has no room for `needed` more bytes."""
    free = free_space(folder)
    if needed > free:
        raise OSError(
            f"disk too small for {folder}: needed {readable(needed)}, free {readable(free)}; "
            "free space or point root to another disk"
        )

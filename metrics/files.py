"""Files that appear whole or not at all, and folders that others may have made."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename; missing folders are made.

    Raises OSError, naming the file, where the disk refuses; an existing file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path}: {error}; free some space there or choose another folder") from error


def check_writable(path: str | Path) -> None:
    """Raise OSError, naming it, where the file `path` can't be written: before the work whose result it is to hold.

    Nothing is left behind: what is tried is a file without a name in the nearest folder that exists.
    """
    path = Path(path)
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder; move it away or choose another place")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror} ({folder}); choose another place") from error


def write_cache(save: Callable[[], Any]) -> None:
    """Call `save`, which keeps a result for later commands: where the disk refuses it, that is said, and no error."""
    try:
        save()
    except OSError as error:
        print(f"warning: {error}. It is only a cache: the next command computes it again", file=sys.stderr, flush=True)


def inside(folder: str | Path, name: str) -> Path:
    """`folder`/`name`. Raises ValueError where a link leads out of the folder: whoever made it could show any file by it."""
    path = Path(folder) / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} is a link that leads out of {folder}, which is not followed; put a copy in its place")
    return path

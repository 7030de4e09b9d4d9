"""Files that appear whole or not at all, leftovers of killed processes, and checks of names and places."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"(.+)\.tmp-(\d+)-([0-9a-f]{8})")  # name, process, its space
_DAY = 24 * 3600  # seconds
_LONGEST = 255  # bytes of a name in most file systems


def check_folder_name(option: str, name: str, below: str, several: bool = False) -> None:
    """Refuse a name that is not one folder below the folder `below`, or with `several` a path of some.

    Raises:
        ValueError: naming the option.
    """
    parts = name.split("/")
    plain = all(part.strip() and part not in (".", "..") and part.isprintable() for part in parts)
    if not plain or len(parts) > 1 + several * len(parts) or max(len(part.encode()) for part in parts) > _LONGEST:
        what = "a folder, or one in others (a/b)," if several else "one folder"
        raise ValueError(
            f"{option}={name!r} must name {what} below {below}/, not empty, without .. and at most {_LONGEST} long"
        )


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename it; missing folders are made.

    Raises:
        OSError: naming the file, where the disk refuses; an existing file is then as it was.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; free some space there or choose another folder") from error


def write_json(path: str | Path, content: Any, *, indent: int = 1, **options: Any) -> None:
    """Write `content` as JSON, as `write_file` does; options: of `json.dumps`, such as sort_keys or allow_nan."""
    write_file(path, (json.dumps(content, indent=indent, **options) + "\n").encode())


def write_ordered_json(path: str | Path, content: Any) -> None:
    """Write `content` as results are: JSON with keys in their order and finite numbers alone.

    Raises:
        ValueError: For a number that is not finite.
    """
    write_json(path, content, indent=2, allow_nan=False)


@contextmanager
def atomic_write(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path`, and rename what the block wrote there (a file or a folder) to `path` at its end.

    Where the block raises, `path` stays as it was and what lies under the temporary name is removed. A killed process leaves
    that behind under a name that nobody reads, and it goes when the same path is written again.

    Args:
        path: the file or folder; missing parent folders are made.
        sync: whether the file and its new name are on the disk at the end, so that they survive a loss of power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{_process_space()}")
    remove(temporary)  # of a dead process that had this one's number
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            _sync(path.parent)
    finally:
        remove(temporary)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left in a folder under temporary names.

    Whether a process of another machine lives can't be seen: its file counts as a leftover a day after its last change.

    Args:
        folder: to look into.
        name: of the file that was written; None: all.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or name not in (None, match[1]):
            continue
        if match[3] == _process_space():
            dead = not _alive(int(match[2]))
        else:
            dead = time.time() - path.lstat().st_mtime > _DAY
        if dead:
            remove(path)


@cache
def _process_space() -> str:
    """Eight hex digits that two processes share only if each can see whether the other one is alive."""
    try:
        place = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        place = socket.gethostname()
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that it holds, as far as the disk lets it go; nothing where there is none."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_writable(path: str | Path) -> None:
    """Check that the file `path` can be written, before the work whose result it is to hold.

    Nothing is left behind: a file without a name is tried in the nearest folder that exists.

    Raises:
        OSError: naming the file.
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
    """Call `save`, which keeps a result for later commands; a disk that refuses it is a warning, not an error."""
    try:
        save()
    except OSError as error:
        print(f"warning: {error}. It is only a cache: the next command computes it again", file=sys.stderr, flush=True)


def resolve_inside(folder: str | Path, name: str) -> Path:
    """The path of `name` in a folder that others may have made.

    Raises:
        ValueError: where a link leads out of the folder, by which its maker could show any file of the reader's.
    """
    path = Path(folder) / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} is a link that leads out of {folder}, which is not followed; put a copy in its place")
    return path

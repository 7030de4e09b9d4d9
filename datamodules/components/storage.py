"""Files and folders that exist whole or not at all, .npy files that are checked before use, and disk space."""

import errno
import json
import math
import os
import shutil
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.checkpoints.block_hashes import BlockHashes
from stillhouse.files import unfinished


@contextmanager
def named_if_full(path: Path) -> Iterator[None]:
    """Name `path` in the error of a disk that fills up while the block writes it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = os.strerror(error.errno)
        raise OSError(f"{reason}: {path} was not written, nothing of it is left; free space and run again") from error


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """As `stillhouse.files.unfinished`, with the error of a full disk naming `path`."""
    with named_if_full(path), unfinished(path) as temporary:
        yield temporary


def write_json(path: Path, content: dict[str, Any]) -> None:
    with scratch(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, path)


def readable(size: float) -> str:
    """Bytes as people read them: 1.3 GB."""
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_space(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def folder_size(folder: Path) -> int:
    """Bytes of the files that lie directly in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def require_space(folder: Path, needed: int) -> None:
    """Errors: OSError when `folder` cannot take `needed` more bytes."""
    free = free_space(folder)
    if needed > free:
        raise OSError(
            f"disk too small for {folder}: needed {readable(needed)}, free {readable(free)}; "
            "free space or point root to another disk"
        )


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a .npy file of that array begins with."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    content = BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def write_npy(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[np.ndarray], *, trailer: bool = False
) -> BlockHashes:
    """Stream arrays into one .npy file and return the hashes of its data; `trailer` appends the 32 bytes of the whole.

    Written, not mapped: on a full disk a write raises OSError, whereas a store to a mapped page kills the process.
    """
    hashes = BlockHashes()
    with open(path, "xb") as file:
        file.write(npy_header(shape, dtype))
        for chunk in chunks:
            data = memoryview(np.ascontiguousarray(chunk)).cast("B")
            hashes.update(data)
            file.write(data)
        if trailer:
            file.write(hashes.digest)
        file.flush()
        os.fsync(file.fileno())
    return hashes


def check_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype, way_out: str, *, trailer: bool = False) -> int:
    """The byte at which the data of a .npy file begin.

    Errors: OSError where the file is absent, is no such array, or is shorter or longer than its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {way_out}")
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    except (ValueError, SyntaxError, tokenize.TokenError):  # whatever numpy makes of a damaged header
        raise OSError(f"{path} is not a .npy file of this project: {way_out}") from None
    if (found_shape, found_dtype, fortran) != (tuple(shape), np.dtype(dtype), False):
        found, expected = f"{found_dtype} {found_shape}", f"{np.dtype(dtype)} {tuple(shape)}"
        raise OSError(f"{path} is a foreign file, it holds {found} instead of {expected}: {way_out}")
    expected_size = offset + math.prod(shape) * np.dtype(dtype).itemsize + 32 * trailer
    size = path.stat().st_size
    if size != expected_size:
        raise OSError(f"{path} is damaged, {size} bytes instead of {expected_size}: {way_out}")
    return offset

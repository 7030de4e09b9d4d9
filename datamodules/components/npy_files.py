"""Arrays as .npy files on disk: written in chunks with their hash, and checked before use."""

import math
import os
import tokenize
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np

from stillhouse.checkpoints.block_hashes import BlockHashes


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The bytes before the data in the .npy file of an array."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    content = BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def write_npy(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[np.ndarray], *, trailer: bool = False
) -> BlockHashes:
    """Write the chunks of one array into a .npy file, which must not exist yet.

    They are written, not mapped: on a full disk a write raises OSError, whereas a store to a mapped page kills the process.

    Args:
        path: The file.
        shape: Of the whole array.
        dtype: Of the array.
        chunks: Its parts along the first axis.
        trailer: Whether the 32 bytes of the data's SHA-256 follow the data.

    Returns:
        The hashes of the data.
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
    """The offset of the data in a .npy file, once its header and size have been checked.

    Args:
        path: The file.
        shape: That the array must have.
        dtype: That the array must have.
        way_out: What to do about a damaged file, for the error.
        trailer: Whether 32 bytes of a hash follow the data.

    Raises:
        OSError: The file is missing, holds another array, or is shorter or longer than its header says.
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

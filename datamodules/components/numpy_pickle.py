"""Pickles of numpy arrays and plain values, such as CIFAR-10's batches, read without running anything that they name.

What is read, and that nothing is run, is `stillhouse.checkpoints.inert_pickle`'s; here stand the names that arrays are pickled
by, and what they become. Pickles of weights have others: those of torch, in `stillhouse.checkpoints`.
"""

import math
import os
from typing import Any, BinaryIO

import numpy as np

from stillhouse.checkpoints.inert_pickle import DamagedPickle, Record, RefusedPickle, read_pickle

_ARRAY = "numpy.ndarray"
_CODES = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")


def _encode(text: str, encoding: str) -> bytes:
    """The bytes that Python 3 pickles as text by protocol 2."""
    if encoding != "latin1":
        raise RefusedPickle("text in another encoding")
    return text.encode("latin1")


def _dtype(code: Any, *_: Any) -> Record:
    code = code.decode("latin1") if isinstance(code, bytes) else code
    if code not in _CODES:
        raise DamagedPickle("an array of an unknown kind")
    return Record(code)


_MAKERS = {
    "numpy.core.multiarray._reconstruct": lambda *_: Record(_ARRAY),
    "numpy._core.multiarray._reconstruct": lambda *_: Record(_ARRAY),
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
}


def unpickle(file: BinaryIO, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, numbers, text and containers.

    Args:
        file: The pickle.
        where: What errors call it.

    Returns:
        The dictionary, with keys as str; Python 2's text becomes bytes.

    Raises:
        OSError: The pickle is damaged or holds anything else.
    """
    try:
        content = read_pickle(file, _size(file), _MAKERS)
        if not isinstance(content, dict):
            raise DamagedPickle(f"a {type(content).__name__} stands where a dict should")
        return {_text(key): _value(value) for key, value in content.items()}
    except RefusedPickle as error:
        raise OSError(
            f"{where} is damaged or no such data (it asks for {error}, which data of this kind never does); fetch it again"
        ) from error
    except DamagedPickle as error:
        raise OSError(f"{where} is damaged or no such data ({error}); fetch it again") from error


def numbers(value: Any) -> np.ndarray:
    """An array as it is, a list of integers as an array, and anything else as an empty array of objects.

    numpy by itself would follow lists that contain each other without end.
    """
    if isinstance(value, list) and all(type(number) is int and abs(number) < 1 << 62 for number in value):
        return np.array(value, np.int64)
    return value if isinstance(value, np.ndarray) else np.empty(0, object)


def _size(file: BinaryIO) -> int:
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _value(value: Any) -> Any:
    return _array(value.state) if isinstance(value, Record) and value.name == _ARRAY else value


def _array(state: Any) -> np.ndarray:
    """The array of numpy's pickled state: (version, shape, dtype, whether in Fortran's order, bytes)."""
    try:
        _, shape, dtype, fortran, data = state
        kind = np.dtype(dtype.name).newbyteorder(_text(dtype.state[1]))
        lengths = tuple(length for length in shape if type(length) is int and length >= 0)
        whole = len(lengths) == len(shape) and isinstance(data, bytes)
        if whole and math.prod(lengths) * kind.itemsize == len(data):
            return np.frombuffer(data, kind).reshape(lengths, order="F" if fortran else "C")
    except (TypeError, ValueError, LookupError, AttributeError):
        pass
    raise DamagedPickle("an array without its values")

"""Pickles of arrays and plain values from elsewhere, read without running anything that they name."""

import math
import os
from typing import Any, BinaryIO

import numpy as np

from stillhouse.checkpoints.inert_pickle import DamagedPickle, Record, RefusedPickle, read_pickle

_ARRAY = "numpy.ndarray"
_CODES = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
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
    """The dictionary in a pickle of arrays, numbers, text and containers; Python 2's text becomes bytes, keys are str.

    Errors: OSError that names `where` for a pickle of anything else, or a damaged one.
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
    """An array as it is, or that of a list of whole numbers; of anything else an empty one of objects.

    By numpy alone lists that hold each other would be followed without end.
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
    """From what numpy keeps of one: (version, shape, dtype, whether in Fortran's order, bytes)."""
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

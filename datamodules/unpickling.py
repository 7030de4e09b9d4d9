"""Pickles of arrays and plain values from elsewhere, read without running anything that they name."""

import pickle
from typing import Any, BinaryIO

import numpy as np

_RECONSTRUCT = np.empty(0).__reduce__()[0]


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


# By hand instead of by import: a name in the file chooses among these, it never reaches a module.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data of this kind never does")
        return _ALLOWED[module, name]


def unpickle(file: BinaryIO, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, numbers, text and containers; Python 2's text becomes bytes, keys are str.

    Errors: OSError that names `where` for a pickle of anything else, or a damaged one.
    """
    try:
        content = _Restricted(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except Exception as error:  # a damaged pickle can raise anything
        raise OSError(
            f"{where} is damaged or no such data ({error or type(error).__name__}); fetch it again"
        ) from error

"""Tensors inside pickles: what PyTorch's own functions would rebuild, with every size checked against the bytes there."""

import io
import math
import sys
from typing import Any

import torch
from torch import Tensor

from stillhouse.checkpoints.inert_pickle import DamagedPickle, Global, read_pickle

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before its zip files
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def storage_from_bytes(data: Any) -> Tensor:
    """Read the values (N,) of one storage as torch.save writes it.

    Raises:
        DamagedPickle: for bytes that make no sense.
        RefusedPickle: for names that no storage needs.
    """
    if not isinstance(data, bytes):
        raise DamagedPickle(f"a storage is a {type(data).__name__}")
    stream, names = io.BytesIO(data), dict.fromkeys(_DTYPES)
    magic, version, system, storage, keys = (read_pickle(stream, len(data), names, lambda key: key) for _ in range(5))
    if (
        (magic, version) != (_MAGIC, _VERSION)
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise DamagedPickle("a storage of an unknown version")
    kind, dtype, key, _, count, view = storage
    # Compared as text: two nests of tuples are compared in more steps than anybody has time for.
    if kind != "storage" or not isinstance(dtype, Global) or not isinstance(key, str) or view is not None:
        raise DamagedPickle("a storage without its values")
    if not isinstance(keys, list) or len(keys) != 1 or not isinstance(keys[0], str) or keys[0] != key:
        raise DamagedPickle("a storage without its values")
    dtype, start = _DTYPES[dtype.name], stream.tell() + 8
    if int.from_bytes(data[start - 8 : start], sys.byteorder) != count or len(data) - start != count * dtype.itemsize:
        raise DamagedPickle(f"a storage of {count} values in {len(data) - start} bytes")
    return torch.frombuffer(bytearray(memoryview(data)[start:]), dtype=dtype) if count else torch.empty(0, dtype=dtype)


class Storages:
    """The storages of one file, by their bytes: what it names a thousand times is read and kept once."""

    def __init__(self):
        self._known: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, data: Any) -> Tensor:
        """Read a storage as `storage_from_bytes` does, or take it from those that were read before."""
        if id(data) not in self._known:
            self._known[id(data)] = data, storage_from_bytes(data)  # with the data, whose number then nothing else gets
        return self._known[id(data)][1]


def tensor_of(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Make a view of a storage; what else a pickle says of a tensor (gradients, hooks) is left out.

    Args:
        storage: values (N,).
        offset: of the first value.
        size: the view's shape.
        stride: steps in the storage along each dimension.

    Raises:
        DamagedPickle: for a view that reaches beyond the storage.
    """
    numbers = (offset, *size, *stride)
    if (
        not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)
        or not len(size) == len(stride) <= 8
    ):
        raise DamagedPickle("a tensor of impossible shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not isinstance(storage, Tensor) or count > storage.numel() or (count and last >= storage.numel()):
        raise DamagedPickle(f"a tensor of {count} values reaches beyond its storage")
    return storage.as_strided(size, stride, offset)


def parameter_of(value: Any, *_: Any) -> Tensor:
    """Take a parameter for its tensor.

    Raises:
        DamagedPickle: for what is none.
    """
    if not isinstance(value, Tensor):
        raise DamagedPickle(f"a parameter is a {type(value).__name__}")
    return value

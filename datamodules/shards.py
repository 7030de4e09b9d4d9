"""One long array in whole files of equal size, each sealed with the hash of its data."""

import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from datamodules.storage import check_npy, hash_range, scratch, write_npy

_WAY_OUT = "delete this file and run again, only it will be sampled again"


class Shards:
    """Entries 0 .. count-1 of one shape and dtype in FOLDER/shard-00000.npy and so on, `size` entries each.

    Every shard is full, the last one too, so that a larger `count` finds them all valid. A shard is a .npy file followed by
    the 32 bytes of its SHA-256: in one file, data and hash cannot come apart.
    """

    def __init__(self, folder: Path, count: int, size: int, entry_shape: tuple[int, ...], dtype: str):
        self.folder = folder
        self.count = count
        self.size = size
        self.shape = (size, *entry_shape)
        self.dtype = np.dtype(dtype)
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def missing(self) -> list[int]:
        """Errors: OSError where a shard is there but not whole."""
        # A listing rather than single look-ups: network file systems remember for a while that a file was absent.
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        absent = [shard for shard in range(len(self)) if self.path(shard).name not in present]
        for shard in set(range(len(self))).difference(absent):
            self._check(shard)
        return absent

    def write(self, shard: int, chunks: Iterable[np.ndarray]) -> None:
        """The shard appears when all chunks are on disk."""
        with scratch(self.path(shard)) as temporary:
            write_npy(temporary, self.shape, self.dtype, chunks, trailer=True)
            os.replace(temporary, self.path(shard))

    def _check(self, shard: int) -> int:
        return check_npy(self.path(shard), self.shape, self.dtype, _WAY_OUT, trailer=True)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._mapped:
            offset = self._check(shard)
            # torch's mapping keeps no file descriptor, numpy's does: a thousand shards would exhaust the usual limit.
            raw = torch.from_file(str(self.path(shard)), size=offset + self.bytes, dtype=torch.uint8)
            self._mapped[shard] = raw.numpy()[offset:].view(self.dtype).reshape(self.shape)
        return self._mapped[shard]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Entries `indices` (B,) in that order, fresh memory.

        Errors: IndexError outside [0, count), FileNotFoundError for an absent shard, OSError for a damaged one.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.count:
            raise IndexError(f"indices {indices.min()} to {indices.max()} exceed {self.count} entries of {self.folder}")
        batch = np.empty((len(indices), *self.shape[1:]), self.dtype)
        shards, rows = np.divmod(indices, self.size)
        order = np.argsort(indices, kind="stable")
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1))
        for start, stop in itertools.pairwise(edges.tolist()):  # over the shards touched, not over entries
            members = order[start:stop]
            batch[members] = self._map(int(shards[members[0]]))[rows[members]]
        return batch

    def verify(self) -> None:
        """Errors: OSError where the data of a shard are not those that were written."""
        for shard in range(len(self)):
            path, offset = self.path(shard), self._check(shard)
            with open(path, "rb") as file:
                file.seek(offset + self.bytes)
                recorded = file.read().hex()
            if hash_range(path, offset, self.bytes) != recorded:
                raise OSError(f"{path} is damaged, its data do not have the recorded SHA-256: {_WAY_OUT}")

"""One long array in files of equal size, each of which ends with the hash of its data."""

import itertools
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from datamodules.components.disk_space import named_if_full
from datamodules.components.npy_files import check_npy, write_npy
from stillhouse.checkpoints.block_hashes import AT_START, BLOCK, hash_range
from stillhouse.files import atomic_write

_WAY_OUT = "delete this file and run again, only it will be sampled again"


class Shards:
    """Entries 0 .. count-1 of one shape and dtype in FOLDER/shard-00000.npy and so on, `size` entries each.

    The last shard, where `count` does not fill it, is shard-00000-first-64.npy with the entries asked for: a larger `count`
    finds all shards valid except that one and makes it anew, whole; a smaller one uses whole shards where they exist. A shard
    is a .npy file followed by the 32 bytes of its SHA-256: in one file, data and hash cannot be separated.

    Args:
        folder: Of the files.
        count: Number of entries.
        size: Entries per shard.
        entry_shape: Shape of an entry.
        dtype: numpy's name of the entries' type.
    """

    def __init__(self, folder: Path, count: int, size: int, entry_shape: tuple[int, ...], dtype: str):
        self.folder = folder
        self.count = count
        self.size = size
        self.entry_shape = entry_shape
        self.dtype = np.dtype(dtype)
        self.entry_bytes = math.prod(entry_shape) * self.dtype.itemsize
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def entries(self, shard: int) -> range:
        """The entries of `shard` that are asked for."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def path(self, shard: int) -> Path:
        """The file of `shard`, whether it exists yet or not."""
        return self._file(shard)[0]

    def _file(self, shard: int) -> tuple[Path, int]:
        """The path of a shard's file, and the number of entries that it holds."""
        whole, asked = self.folder / f"shard-{shard:05d}.npy", len(self.entries(shard))
        if asked == self.size or whole.exists():
            return whole, self.size
        return self.folder / f"shard-{shard:05d}-first-{asked}.npy", asked

    def missing(self) -> list[int]:
        """The shards that do not exist yet.

        Raises:
            OSError: A shard exists but is not whole.
        """
        # A listing instead of single look-ups: network file systems remember for a while that a file was absent.
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        absent = [shard for shard in range(len(self)) if self.path(shard).name not in present]
        for shard in set(range(len(self))).difference(absent):
            self._check(shard)
        return absent

    def write(self, shard: int, chunks: Iterable[np.ndarray]) -> None:
        """Write a shard, whose file appears when all chunks are on disk."""
        path, entries = self._file(shard)
        with named_if_full(path), atomic_write(path) as temporary:
            write_npy(temporary, (entries, *self.entry_shape), self.dtype, chunks, trailer=True)

    def _check(self, shard: int) -> tuple[Path, int, int]:
        """Path, number of entries and offset of the data of a shard that is whole; OSError for another."""
        path, entries = self._file(shard)
        shape = (entries, *self.entry_shape)
        return path, entries, check_npy(path, shape, self.dtype, _WAY_OUT, trailer=True)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._mapped:
            path, entries, offset = self._check(shard)
            # torch's mapping keeps no file descriptor open; numpy's does, and a thousand shards would exceed the usual limit.
            raw = torch.from_file(str(path), size=offset + entries * self.entry_bytes, dtype=torch.uint8)
            self._mapped[shard] = raw.numpy()[offset:].view(self.dtype).reshape(entries, *self.entry_shape)
        return self._mapped[shard]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """A copy of the entries `indices` (B,), in that order.

        Raises:
            IndexError: An index is outside [0, count).
            FileNotFoundError: A shard is missing.
            OSError: A shard is damaged.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.count:
            raise IndexError(f"indices {indices.min()} to {indices.max()} exceed {self.count} entries of {self.folder}")
        batch = np.empty((len(indices), *self.entry_shape), self.dtype)
        shards, rows = np.divmod(indices, self.size)
        order = np.argsort(indices, kind="stable")
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1))
        for start, stop in itertools.pairwise(edges.tolist()):  # over the shards touched, not over entries
            members = order[start:stop]
            batch[members] = self._map(int(shards[members[0]]))[rows[members]]
        return batch

    def verify(self, everything: bool = True) -> None:
        """Compare shards with their hashes.

        Args:
            everything: All shards; otherwise a few, chosen at random each time, of some megabytes but at least one.

        Raises:
            OSError: The data of a shard are not those that were written.
        """
        few = min(len(self), max(1, AT_START * BLOCK // (self.size * self.entry_bytes)))
        for shard in range(len(self)) if everything else random.SystemRandom().sample(range(len(self)), few):
            path, entries, offset = self._check(shard)
            with open(path, "rb") as file:
                file.seek(offset + entries * self.entry_bytes)
                recorded = file.read().hex()
            if hash_range(path, offset, entries * self.entry_bytes) != recorded:
                raise OSError(f"{path} is damaged, its data do not have the recorded SHA-256: {_WAY_OUT}")

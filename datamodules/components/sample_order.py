"""The order of training samples: endless, a pure function of (seed, position), and divided over the processes."""

from collections.abc import Iterator

import numpy as np

from stillhouse.diffusion.random_numbers import derive_seed


class EpochOrder:
    """Items 0 .. count-1 without end, each exactly once per epoch of `count` positions, in a new random order each epoch.

    Raises:
        ValueError: For no items.
    """

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise ValueError(f"an order needs at least one item, got count={count}")
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """The items in the order of one epoch, int64 (count,)."""
        if epoch != self._epoch:
            # Sorted raw words: numpy promises that this stream stays, whereas that of Generator.permutation may change.
            words = np.random.PCG64(derive_seed(self.seed, epoch)).random_raw(self.count)
            self._epoch, self._permutation = epoch, np.argsort(words, kind="stable")
        return self._permutation

    def batch(self, position: int, size: int) -> np.ndarray:
        """Items at positions position .. position+size-1, int64 (size,), also across epochs."""
        pieces = []
        end = position + size
        while position < end:
            epoch, offset = divmod(position, self.count)
            piece = self.permutation(epoch)[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def items_per_process(batch_size: int, world_size: int) -> int:
    """A process' share of the global batch.

    Raises:
        ValueError: The batch cannot be divided evenly.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} (global) cannot be divided evenly over {world_size} devices; "
            f"set batch_size to a multiple of {world_size} or change trainer.devices"
        )
    return batch_size // world_size


class RankBatches:
    """Batches of one process without end, as (position of the first item, items).

    Global batch k covers positions [k B, (k+1) B), process r its r-th share: side by side, the shares are the batch that a
    single process would see.

    Args:
        order: Of all items.
        batch_size: B, over all processes.
        rank: r.
        world_size: Number of processes.
        start: The first k.
    """

    def __init__(self, order: EpochOrder, batch_size: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.order = order
        self.global_size = batch_size
        self.share = items_per_process(batch_size, world_size)
        self.rank = rank
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        position = self.start * self.global_size + self.rank * self.share
        while True:
            yield position, self.order.batch(position, self.share)
            position += self.global_size


def fixed_batches(count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, np.ndarray]]:
    """Batches of one process that cover items 0 .. count-1 once and in order, as (position of the first item, items).

    Every process has the same number of items.

    Raises:
        ValueError: `count` or the batch cannot be divided evenly.
    """
    items_per_process(batch_size, world_size)
    if count % world_size:
        raise ValueError(
            f"held_out={count} cannot be divided evenly over {world_size} devices; set it to a multiple of {world_size}"
        )
    batches = []
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first) // world_size
        position = first + rank * size
        batches.append((position, np.arange(position, position + size)))
    return batches

"""Batches in the order of training: whole batches by index, from the exact position where training stands."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.components.sample_order import EpochOrder, RankBatches, fixed_batches

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""CPU cores that this process may use."""

Batch = dict[str, Tensor]
Fetch = Callable[[int, np.ndarray], Batch]
"""(position of the first item, items) -> batch on the CPU; with workers the function is pickled."""


class _WholeBatches:
    """A data set that gives the loader a whole batch at a time."""

    def __init__(self, fetch: Fetch):
        self.fetch = fetch

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> Batch:
        return self.fetch(*batch)


def _unchanged(batch: Batch) -> Batch:
    return batch


class BatchLoader:
    """A loader that asks for its position whenever an iteration begins.

    Lightning starts a new iteration at every epoch (`limit_train_batches`) and after a resume. This is no DataLoader, so
    Lightning neither replaces the sampler, which knows its rank, nor recommends workers, which are slower here.

    Args:
        fetch: Loads a batch.
        batches: Called at the start of each iteration; gives (position of the first item, items) of each batch.
        pin_memory: As of torch's DataLoader.
        num_workers: Processes that fetch, at most one per core.
    """

    def __init__(
        self,
        fetch: Fetch,
        batches: Callable[[], Iterable[tuple[int, np.ndarray]]],
        pin_memory: bool = False,
        num_workers: int = 0,
    ):
        self.fetch = fetch
        self.batches = batches
        self.pin_memory = pin_memory
        self.num_workers = num_workers

    def state_dict(self) -> dict[str, Any]:
        """Empty, as the position is the trainer's count of batches; tells Lightning that a resume is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        yield from DataLoader(
            _WholeBatches(self.fetch),
            batch_sampler=self.batches(),
            collate_fn=_unchanged,
            num_workers=min(self.num_workers, CORES),
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # otherwise each iteration would draw from the global random state
        )


class FixedLoader(BatchLoader):
    """A loader of finitely many batches."""

    def __len__(self) -> int:
        return len(list(self.batches()))


def batches_seen(trainer: pl.Trainer | None) -> int:
    """The number of training batches done, which is restored before a resumed loop asks for its loader.

    `processed`, not `ready`: `ready` also counts the batch that an exception interrupted, which would then be skipped.
    """
    if trainer is None:
        return 0
    before = getattr(trainer.lightning_module, "steps_before", 0)  # of the run's stages whose sequence goes on
    return before + trainer.fit_loop.epoch_loop.batch_progress.total.processed


def _placement(trainer: pl.Trainer | None) -> tuple[int, int, bool]:
    if trainer is None:
        return 0, 1, False
    return trainer.global_rank, trainer.world_size, trainer.strategy.root_device.type == "cuda"


def endless_loader(
    trainer: pl.Trainer | None, fetch: Fetch, count: int, batch_size: int, seed: int, num_workers: int = 0
) -> BatchLoader:
    """Shuffled batches without end, from the first that the trainer has not processed.

    Args:
        trainer: Says rank, number of processes and batches done. None: one process, from batch 0.
        fetch: Loads a batch.
        count: Items of the data set.
        batch_size: Over all processes.
        seed: Of the order.
        num_workers: Processes that fetch.

    Raises:
        ValueError: For a batch that the processes cannot divide evenly.
    """
    rank, world_size, pin_memory = _placement(trainer)
    order = EpochOrder(count, seed)
    RankBatches(order, batch_size, rank, world_size)  # an impossible batch size is refused now

    def batches() -> RankBatches:
        return RankBatches(order, batch_size, rank, world_size, start=batches_seen(trainer))

    return BatchLoader(fetch, batches, pin_memory, num_workers)


def fixed_loader(trainer: pl.Trainer | None, fetch: Fetch, count: int, batch_size: int) -> FixedLoader:
    """Every item once, in order, divided evenly over the processes; arguments and errors as for `endless_loader`."""
    rank, world_size, pin_memory = _placement(trainer)
    batches: Any = fixed_batches(count, batch_size, rank, world_size)
    return FixedLoader(fetch, lambda: batches, pin_memory)

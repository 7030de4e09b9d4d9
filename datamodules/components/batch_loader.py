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

CPU = torch.device("cpu")
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
        device: Where the batches go: to a CUDA device they are `copied_ahead`, from pinned memory.
        num_workers: Processes that fetch, at most one per core.
    """

    def __init__(
        self,
        fetch: Fetch,
        batches: Callable[[], Iterable[tuple[int, np.ndarray]]],
        device: torch.device = CPU,
        num_workers: int = 0,
    ):
        self.fetch = fetch
        self.batches = batches
        self.device = device
        self.num_workers = num_workers

    def state_dict(self) -> dict[str, Any]:
        """Empty, as the position is the trainer's count of batches; tells Lightning that a resume is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        on_gpu = self.device.type == "cuda"
        batches = DataLoader(
            _WholeBatches(self.fetch),
            batch_sampler=self.batches(),
            collate_fn=_unchanged,
            num_workers=min(self.num_workers, CORES),
            pin_memory=on_gpu,
            generator=torch.Generator(),  # otherwise each iteration would draw from the global random state
        )
        yield from copied_ahead(batches, self.device) if on_gpu else batches


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy pinned batches to a CUDA device by a stream of its own, each while the one before it is in use.

    A batch is given out once the copy of the next one is under way, since Lightning asks for a batch before it works on the
    previous one: so nothing waits for the copy that was just begun.
    """
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copies = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            copied = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = copies, copied
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the device's current stream, not the host, wait for a copy, and keep its memory until that stream is done with it."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for values in batch.values():
        values.record_stream(stream)
    return batch


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


def _placement(trainer: pl.Trainer | None) -> tuple[int, int, torch.device]:
    if trainer is None:
        return 0, 1, CPU
    return trainer.global_rank, trainer.world_size, trainer.strategy.root_device


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
    rank, world_size, device = _placement(trainer)
    order = EpochOrder(count, seed)
    RankBatches(order, batch_size, rank, world_size)  # an impossible batch size is refused now

    def batches() -> RankBatches:
        return RankBatches(order, batch_size, rank, world_size, start=batches_seen(trainer))

    return BatchLoader(fetch, batches, device, num_workers)


def fixed_loader(trainer: pl.Trainer | None, fetch: Fetch, count: int, batch_size: int) -> FixedLoader:
    """Every item once, in order, divided evenly over the processes; arguments and errors as for `endless_loader`."""
    rank, world_size, device = _placement(trainer)
    batches: Any = fixed_batches(count, batch_size, rank, world_size)
    return FixedLoader(fetch, lambda: batches, device)

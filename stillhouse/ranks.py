"""Work spread over the processes of torch.distributed, in an order that does not depend on their number."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

_APART = ContextVar("apart", default=False)


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes; (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_slice(total: int) -> slice:
    """The contiguous part of range(total) that this process works on; the parts of all ranks follow each other."""
    rank, world = rank_and_world()
    return slice(total * rank // world, total * (rank + 1) // world)


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """All `total` rows on every rank, in order, from each rank's `share(total)` of them, (n, D)."""
    _, world = rank_and_world()
    if world == 1:
        return rows
    sizes = [total * (r + 1) // world - total * r // world for r in range(world)]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # collectives want equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@contextmanager
def apart_from_others() -> Iterator[None]:
    """Within the block `average_over_ranks` gives back this rank's own values: an attempt may fail on one rank alone."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def average_over_ranks(values: Mapping[str, Tensor | float], device: torch.device | str) -> dict[str, Tensor | float]:
    """Values by name, each its mean over all ranks, which must ask for the same ones in the same order; floats are float32."""
    _, world = rank_and_world()
    if world == 1 or not values or _APART.get():
        return dict(values)
    tensors = [v.to(device) if isinstance(v, Tensor) else torch.tensor(v, device=device) for v in values.values()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / world).split([tensor.numel() for tensor in tensors])
    return {name: part.view(t.shape).to(t.dtype) for name, part, t in zip(values, parts, tensors, strict=True)}


def max_over_ranks(seconds: float, device: torch.device | str) -> float:
    """The largest `seconds` of all ranks."""
    if rank_and_world()[1] == 1:
        return seconds
    longest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def run_on_rank_zero(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 alone, and return its result, or raise its ValueError or OSError, on every rank."""
    rank, world = rank_and_world()
    if world == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:  # the others wait for it
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def progress_bar(total: int, label: str | None) -> tqdm:
    """A bar with images per second and the time left, on rank 0, which counts its own part; none where `label` is None."""
    silent = label is None or rank_and_world()[0] != 0
    interval = 2 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=label, unit="img", mininterval=interval, disable=silent, leave=False)

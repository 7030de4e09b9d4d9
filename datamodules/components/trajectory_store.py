"""Trajectories of a teacher, sampled once and stored: (noise, label) -> states of its solver, in shards on disk."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.components.disk_space import free_space, readable, require_space
from datamodules.components.shards import Shards
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.diffusion.teacher import Teacher
from stillhouse.files import remove_leftovers, write_json
from stillhouse.metrics.images import from_uint8, to_uint8

FORMAT = 1
DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
_SPOT_TOLERANCE = 0.01


def decode(states: Tensor) -> Tensor:
    """Stored states as float32; images are in [-1, 1]."""
    return from_uint8(states) if states.dtype == torch.uint8 else states.float()


class TrajectoryStore:
    """Trajectories of one teacher, entry i a function of the seed `first_seed` + i alone.

    An entry is the states after the kept solver steps, (K, C, H, W). Noise and labels are not stored:
    `diffusion.random_numbers` gives them again exactly, on any device.

    The folder's name contains a hash of everything that decides the states: teacher weights, solver, noise levels, kept steps,
    dtype, seeds, labels, shape, shard size. `count` is not among them: a larger one extends the same store, of which only a
    last shard that was not full is sampled again. Neither is the sampling `batch_size`, which affects only rounding.

    Args:
        root: The folder of all stores.
        teacher: The teacher.
        count: Number of trajectories.
        first_seed: Of entry 0.
        keep: Solver steps among 1 .. steps whose states are stored; by default the last, and those at `through`.
        through: Noise levels that the schedule is made to pass through (`Teacher.sigmas`).
        dtype: uint8 for end points, as images clipped to [-1, 1]; float16 or float32 for any states.
        steps: Of the solver; None: the teacher's own.
        shard_size: Trajectories per file.
        batch_size: Trajectories sampled at once.

    Raises:
        ValueError: Steps, dtype and sizes do not fit each other.
    """

    def __init__(
        self,
        root: str | Path,
        teacher: Teacher,
        *,
        count: int,
        first_seed: int,
        keep: Iterable[int] | None = None,
        through: Sequence[float] = (),
        dtype: str = "uint8",
        steps: int | None = None,
        shard_size: int = 1024,
        batch_size: int = 256,
    ):
        check_counts(count=count, shard_size=shard_size, batch_size=batch_size)
        check_counts(0, first_seed=first_seed)
        check_choice("dtype", dtype, tuple(DTYPES))
        sigmas = teacher.sigmas(steps, through)
        self.teacher = teacher
        self.asked_steps, self.steps = steps, len(sigmas) - 1  # a schedule may have fewer than it is asked for
        self.through = tuple(through)
        passed = (sigmas.tolist().index(level) for level in self.through)
        self.keep = _checked_keep((*passed, self.steps) if keep is None else tuple(keep), self.steps, dtype)
        self.count = count
        self.first_seed = first_seed
        self.dtype = dtype
        self.batch_size = batch_size
        self.image_shape = (teacher.channels, teacher.resolution, teacher.resolution)
        self.description: dict[str, Any] = {
            "format": FORMAT,
            "teacher": teacher.hash,
            "solver": teacher.solver_name,
            "sigmas": [repr(sigma) for sigma in sigmas.tolist()],
            "keep": list(self.keep),
            "dtype": dtype,
            "labels": "uniform",
            "num_classes": teacher.num_classes,
            "resolution": teacher.resolution,
            "channels": teacher.channels,
            "first_seed": first_seed,
            "shard_size": shard_size,
        }
        canonical = json.dumps(self.description, sort_keys=True, separators=(",", ":"))
        address = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self.folder = Path(root) / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', teacher.name)}-{address}"
        self.shards = Shards(self.folder, count, shard_size, (len(self.keep), *self.image_shape), dtype)

    def __len__(self) -> int:
        return self.count

    def estimate(self) -> int:
        """The number of bytes that `fill` still has to write, with 160 for header and hash of each shard."""
        return sum(len(self.shards.entries(shard)) * self.shards.entry_bytes + 160 for shard in self.shards.missing())

    def fill(
        self,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] | None = None,
    ) -> None:
        """Sample the missing shards, shard j in process j mod `world_size`, with the same bits for any number of processes.

        It may be killed at any time and run again.

        Args:
            device: Of the teacher.
            rank: Of this process.
            world_size: Number of processes, which must share the folder `root`.
            barrier: Called after each shard, so that no process waits for another longer than a shard takes: collective
                operations time out.

        Raises:
            OSError: The disk is too small, or a shard is damaged.
            ValueError: States are not finite.
        """
        missing = set(self.shards.missing())
        entries = {shard: len(self.shards.entries(shard)) for shard in missing}
        if missing:
            self._prepare(device, rank, sum(entries.values()))
        # The rounds depend on the number of shards alone: which are missing depends on when a process looks.
        with _progress(sum(entries.values()), rank) as progress:
            for first in range(0, len(self.shards), world_size):
                active = sum(entries.get(shard, 0) for shard in range(first, first + world_size))
                mine = first + rank
                if mine in missing and not self.shards.path(mine).exists():
                    share = active / entries[mine]  # progress counts the other processes' entries as well
                    self.shards.write(
                        mine, self._sample(mine, device, lambda n, s=share: progress.update(round(n * s)))
                    )
                else:
                    progress.update(active)
                if barrier:
                    barrier()
        if barrier and (absent := self.shards.missing()):
            path = self.shards.path(absent[0])
            raise FileNotFoundError(f"{path} of another rank is not visible here: set root to a folder all nodes share")

    def _prepare(self, device: torch.device | str, rank: int, entries: int) -> None:
        needed = self.estimate()
        require_space(self.folder, needed)
        if rank == 0:
            print(
                f"{self.folder}: sampling {entries:,} trajectories of {self.steps} steps, {readable(needed)} on disk "
                f"({readable(free_space(self.folder))} free)",
                flush=True,
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        write_json(self.folder / "meta.json", {"teacher_name": self.teacher.name, **self.description}, sort_keys=True)
        self.teacher.to(device)

    def _sample(self, shard: int, device: torch.device | str, done: Callable[[int], object]) -> Iterator[np.ndarray]:
        # The same batches for any number of processes: a kernel's result may depend on the batch around a sample.
        entries = self.shards.entries(shard)
        for start in range(entries.start, entries.stop, self.batch_size):
            stop = min(start + self.batch_size, entries.stop)
            yield self._encode(self._solve(torch.arange(start, stop, device=device))).cpu().numpy()
            done(stop - start)

    def _solve(self, entries: Tensor) -> Tensor:
        """The kept states (B, K, C, H, W) of the entries (B,), int64, on their device."""
        seeds = entries + self.first_seed
        noise, labels = sample_noise(seeds, self.image_shape), sample_labels(seeds, self.teacher.num_classes)
        states = enumerate(self.teacher.trajectory(noise, labels, self.asked_steps, through=self.through), start=1)
        return torch.stack([state for step, state in states if step in self.keep], dim=1)

    def _encode(self, states: Tensor) -> Tensor:
        rounded = states.float() if self.dtype == "uint8" else states.to(DTYPES[self.dtype])
        if not torch.isfinite(rounded).all():
            raise ValueError(
                f"teacher {self.teacher.name} gave states that are not finite in {self.dtype}; check it or use float32"
            )
        return to_uint8(rounded) if self.dtype == "uint8" else rounded

    def states(self, indices: np.ndarray) -> Tensor:
        """The states (B, K, C, H, W) of the entries `indices` (B,), in the stored dtype; `decode` makes them float32.

        Raises:
            IndexError: An index is outside [0, count).
            FileNotFoundError: `fill` has not run.
            OSError: A shard is damaged.
        """
        return torch.from_numpy(self.shards.read(indices))

    def verify(self, everything: bool = True) -> None:
        """Raise OSError where data are not those that were written; without `everything` compare some of the shards."""
        self.shards.verify(everything)

    def spot_check(self, entries: int = 4, device: torch.device | str = "cpu") -> None:
        """Solve some evenly spread entries again and compare them with those stored, as root mean square per state.

        The limit is the dtype's rounding plus 1 % of the state, because another device or batch size sums in another
        order and the ODE amplifies that; another teacher, seed, label or solver differs by far more.

        Args:
            entries: How many.
            device: Of the teacher.

        Raises:
            OSError: Names the shard of an entry that differs.
        """
        indices = np.unique(np.linspace(0, self.count - 1, entries).astype(np.int64))
        self.teacher.to(device)
        solved = self._solve(torch.from_numpy(indices).to(device)).double()
        if self.dtype == "uint8":
            solved = solved.clamp(-1, 1)
        size = solved.square().mean((2, 3, 4)).sqrt()
        error = (decode(self.states(indices).to(device)) - solved).square().mean((2, 3, 4)).sqrt()
        rounding = 1 / 255 if self.dtype == "uint8" else torch.finfo(DTYPES[self.dtype]).eps / 2 * size
        right = (error <= rounding + _SPOT_TOLERANCE * size).all(dim=1).cpu().numpy()
        if not right.all():
            entry = int(indices[~right][0])
            raise OSError(
                f"{self.shards.path(entry // self.shards.size)}: entry {entry} is not what teacher {self.teacher.name} "
                "gives now; delete this file and run again, only it will be sampled again"
            )


def _checked_keep(keep: tuple[int, ...], steps: int, dtype: str) -> tuple[int, ...]:
    check_counts(**{f"keep[{i}]": step for i, step in enumerate(keep)})
    if not keep or list(keep) != sorted(set(keep)) or keep[-1] > steps:
        raise ValueError(f"keep must be rising solver steps among 1 .. {steps}, got {list(keep)}")
    if dtype == "uint8" and keep != (steps,):
        raise ValueError(
            f"dtype=uint8 holds end points alone (keep=[{steps}]), earlier states are no images; "
            f"for keep={list(keep)} set dtype to float16 or float32"
        )
    return keep


def _progress(total: int, rank: int) -> tqdm:
    interval = 2 if sys.stderr.isatty() else 10
    return tqdm(total=total, unit="img", mininterval=interval, disable=rank != 0 or not total)

"""What a teacher makes of noise, sampled once and kept: (noise, label) -> states of its solver, in shards on disk."""

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
    """Stored states as float32, images in [-1, 1]."""
    return from_uint8(states) if states.dtype == torch.uint8 else states.float()


class TrajectoryStore:
    """`count` trajectories of one teacher, entry i from seed `first_seed` + i alone.

    Each entry is the states after the solver steps `keep` (among 1 .. steps, default the end point), shape (K, C, H, W).
    `through`: noise levels to which the schedule is bent (`Teacher.sigmas`), whose states are kept if `keep` is not given,
    before the end point.
    Latents and labels are not stored: `diffusion.random_numbers` gives them back exactly, on any device. uint8 is for end points
    (images clipped to [-1, 1]), float16 and float32 for any state.

    The folder's name contains a hash of all that decides the states: teacher weights, solver, noise levels, kept steps,
    dtype, seeds, labels, shape, shard size. `count` is not among them: a larger one extends the same store, of which only a
    last shard that was not full is sampled again. Nor is the sampling `batch_size`, whose effect is rounding alone.

    Errors: ValueError for steps, dtypes and sizes that do not fit.
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
        """Bytes that `fill` has still to write."""
        # 160: header and hash
        return sum(len(self.shards.entries(shard)) * self.shards.entry_bytes + 160 for shard in self.shards.missing())

    def fill(
        self,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] | None = None,
    ) -> None:
        """Sample the missing shards: shard j on rank j mod `world_size`, with the same bits for any rank count.

        It may be killed at any time and run again. With a `barrier` the ranks go shard by shard in step, so that none
        waits for another longer than a shard takes (collectives time out); `root` must be a folder that all ranks share.

        Errors: OSError for a disk that is too small or a damaged shard, ValueError for states that are not finite.
        """
        missing = set(self.shards.missing())
        entries = {shard: len(self.shards.entries(shard)) for shard in missing}
        if missing:
            self._prepare(device, rank, sum(entries.values()))
        # The rounds depend on the shards' number alone: what a rank finds missing depends on when it looks.
        with _progress(sum(entries.values()), rank) as progress:
            for first in range(0, len(self.shards), world_size):
                active = sum(entries.get(shard, 0) for shard in range(first, first + world_size))
                mine = first + rank
                if mine in missing and not self.shards.path(mine).exists():
                    share = active / entries[mine]  # the other ranks' count as well
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
        write_json(self.folder / "meta.json", {"teacher_name": self.teacher.name, **self.description})
        self.teacher.to(device)

    def _sample(self, shard: int, device: torch.device | str, done: Callable[[int], object]) -> Iterator[np.ndarray]:
        # The same batches whatever the number of ranks: the result of a kernel may depend on the batch around a sample.
        entries = self.shards.entries(shard)
        for start in range(entries.start, entries.stop, self.batch_size):
            stop = min(start + self.batch_size, entries.stop)
            yield self._encode(self._solve(torch.arange(start, stop, device=device))).cpu().numpy()
            done(stop - start)

    def _solve(self, entries: Tensor) -> Tensor:
        """Kept states (B, K, C, H, W) of the entries (B,), int64, on their device."""
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
        """States (B, K, C, H, W) of the entries `indices` (B,), in the stored dtype; `decode` makes them float32.

        Errors: IndexError outside [0, count), FileNotFoundError where `fill` has not run, OSError for a damaged shard.
        """
        return torch.from_numpy(self.shards.read(indices))

    def verify(self, everything: bool = True) -> None:
        """Errors: OSError where the data of a shard are not those that were written; without `everything` some are looked at."""
        self.shards.verify(everything)

    def spot_check(self, entries: int = 4, device: torch.device | str = "cpu") -> None:
        """Solve `entries` evenly spread ones again and compare, as root mean square per state.

        The limit is the dtype's rounding plus 1 % of the state, because another device or batch size sums in another
        order and the ODE amplifies that; another teacher, seed, label or solver differs by far more.

        Errors: OSError that names the shard.
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

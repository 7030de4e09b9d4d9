"""Trajectories of teachers as a data set: sampled by all processes when training starts, then served like images."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.components.batch_loader import Batch, BatchLoader, FixedLoader, endless_loader, fixed_loader
from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import PackedImages
from datamodules.components.trajectory_store import DTYPES, TrajectoryStore, decode
from stillhouse.checks import check_counts, check_memory
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, TRAIN_SEEDS, sample_labels, sample_noise
from stillhouse.diffusion.teacher import Teacher

__all__ = ["TrajectoryDataModule", "TrajectoryStore", "decode"]

# States travel as integers of the same width: Lightning's precision plugins convert floats before they are transferred.
_BITS = {"uint8": torch.uint8, "float16": torch.int16, "float32": torch.int32}
_RANGE_SAMPLES = 64
_ORDER_BYTES = 16  # per sample: its random word and its position


def _fetch(stores: Sequence[TrajectoryStore], position: int, indices: np.ndarray) -> Batch:
    states = [store.states(indices).view(_BITS[store.dtype]) for store in stores]
    return {
        "seed": torch.from_numpy(indices + stores[0].first_seed),
        "position": torch.arange(position, position + len(indices)),
        "states": states[0] if len(states) == 1 else torch.cat(states, dim=1),
    }


class TrajectoryDataModule(pl.LightningDataModule):
    """Trajectories to train on, and others to select models by, from disjoint seeds.

    A batch on the device is {"noise": float32 (B, C, H, W), "label": int64 (B,), "seed", "position": int64 (B,), "states":
    float32 (B, K, C, H, W)}, the label only where the teacher has classes. Positions count the samples of all batches and
    devices, a sample's seed decides its noise and label. Several teachers start from the same noise and label, and their
    states follow each other: (B, teachers * K, C, H, W).

    Args:
        teachers: One or several.
        root: The folder of all stores.
        pairs: Trajectories to train on.
        held_out: Trajectories to select models by.
        batch_size: Trajectories per step, on all devices together.
        seed: Decides their order.
        keep, through, dtype, steps, shard_size: As in `TrajectoryStore`.
        sampling_batch: Trajectories that a teacher samples at once on each device.
        images: The real data, for `reference` alone.

    Raises:
        ValueError: As `TrajectoryStore`; for batches or held-out trajectories that do not divide over the devices; for teachers
            whose images differ in size, in classes or, once they are sampled, in their range of values.
    """

    def __init__(
        self,
        teachers: Teacher | Sequence[Teacher],
        *,
        root: str = "data/trajectories",
        pairs: int,
        held_out: int,
        batch_size: int,
        seed: int = 0,
        keep: Iterable[int] | None = None,
        through: Sequence[float] = (),
        dtype: str = "uint8",
        steps: int | None = None,
        shard_size: int = 1024,
        sampling_batch: int = 256,
        images: ImageDataModule | None = None,
    ):
        super().__init__()
        check_counts(pairs=pairs, held_out=held_out, batch_size=batch_size)
        for option, count in (("method.pairs", pairs), ("method.held_out", held_out)):
            check_memory(_ORDER_BYTES * count, f"{option}={count} (lower it): the order of the samples")
        check_counts(0, seed=seed)
        keep = None if keep is None else tuple(keep)
        options = {
            "keep": keep,
            "through": through,
            "dtype": dtype,
            "steps": steps,
            "shard_size": shard_size,
            "batch_size": sampling_batch,
        }
        teachers = list(teachers) if isinstance(teachers, Sequence) else [teachers]
        check_alike(teachers)
        self.train_stores = [
            TrajectoryStore(root, teacher, count=pairs, first_seed=TRAIN_SEEDS, **options) for teacher in teachers
        ]
        self.held_out_stores = [
            TrajectoryStore(root, teacher, count=held_out, first_seed=HELD_OUT_SEEDS, **options) for teacher in teachers
        ]
        self.name = teachers[-1].name
        self.resolution = teachers[0].resolution
        self.channels = teachers[0].channels
        self.num_classes = teachers[0].num_classes
        self.batch_size = batch_size
        self.seed = seed
        self.dtype = dtype
        self.images = images

    def prepare_data(self) -> None:
        if self.images is not None:
            self.images.prepare_data()

    def setup(self, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        strategy = self.trainer.strategy
        for store in (*self.train_stores, *self.held_out_stores):
            store.fill(strategy.root_device, self.trainer.global_rank, self.trainer.world_size, strategy.barrier)
            store.verify(everything=self.images is not None and self.images.verify)
            store.spot_check(device=strategy.root_device)
        if len(self.held_out_stores) > 1:
            check_ranges(self.held_out_stores)

    def reference(self) -> PackedImages:
        if self.images is None:
            raise ValueError(f"trajectories of {self.name} have no real images; pass images= to compare with")
        return self.images.reference()

    def train_dataloader(self) -> BatchLoader:
        fetch = partial(_fetch, self.train_stores)
        return endless_loader(self.trainer, fetch, len(self.train_stores[0]), self.batch_size, self.seed)

    def val_dataloader(self) -> FixedLoader:
        fetch = partial(_fetch, self.held_out_stores)
        return fixed_loader(self.trainer, fetch, len(self.held_out_stores[0]), self.batch_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        seeds, shape = batch["seed"], (self.channels, self.resolution, self.resolution)
        states = decode(batch["states"].view(DTYPES[self.dtype]))
        decoded = {**batch, "noise": sample_noise(seeds, shape), "states": states}
        labels = sample_labels(seeds, self.num_classes)
        return decoded if labels is None else {**decoded, "label": labels}


def check_store(store: object, whose: str) -> None:
    """Raise ValueError for a `method.store` that names no folder; `whose` samples it is for, the message says."""
    if not isinstance(store, str | Path) or not str(store):
        raise ValueError(f"method.store must be a folder for {whose} samples, got {store!r}; try data/trajectories")


def check_alike(teachers: Sequence[Teacher], option: str = "method.teachers") -> None:
    """Raise ValueError, naming the option, for no teacher, or for two whose images differ in size or classes."""
    if not teachers:
        raise ValueError(f"{option} must name at least one teacher")
    for other in teachers[1:]:
        for key in ("resolution", "channels", "num_classes"):
            ours, theirs = getattr(teachers[0], key), getattr(other, key)
            if ours != theirs:
                raise ValueError(
                    f"{option}: {teachers[0].name} has {key}={ours}, {other.name} {theirs}; teachers that start from one "
                    "noise and label must agree in size and classes"
                )


def check_ranges(stores: Sequence[TrajectoryStore]) -> None:
    """Raise ValueError where one teacher's images have another range of values: [0, 1], say, instead of [-1, 1].

    The range is measured as the distance from the 1 % to the 99 % quantile of the first end points, which may differ by half.
    """
    first = np.arange(min(len(stores[0]), _RANGE_SAMPLES))
    widths = []
    for store in stores:
        low, high = np.quantile(decode(store.states(first)[:, -1]).numpy(), (0.01, 0.99))
        widths.append(high - low)
        if max(widths) > 1.5 * min(widths):
            name, other = stores[0].teacher.name, store.teacher.name
            raise ValueError(
                f"method.teachers: the values of {name}'s images span {widths[0]:.2f}, those of {other}'s {widths[-1]:.2f}; "
                "teachers must draw images in one range, [-1, 1]"
            )

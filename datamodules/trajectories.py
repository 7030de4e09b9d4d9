"""Trajectories of a teacher as a data set: sampled by all ranks when training starts, served like images."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.base import ImageDataModule
from datamodules.loading import Batch, BatchLoader, FixedLoader, endless_loader, fixed_loader
from datamodules.packing import PackedImages
from datamodules.trajectory_store import DTYPES, TrajectoryStore, decode
from diffusion.seeds import HELD_OUT_SEEDS, TRAIN_SEEDS, sample_labels, sample_noise
from diffusion.teacher import Teacher
from networks.checks import check_counts

__all__ = ["TrajectoryDataModule", "TrajectoryStore", "decode"]

# States travel as integers of the same width: Lightning's precision plugins convert floats before they are transferred.
_BITS = {"uint8": torch.uint8, "float16": torch.int16, "float32": torch.int32}


def _fetch(store: TrajectoryStore, position: int, indices: np.ndarray) -> Batch:
    states = store.states(indices).view(_BITS[store.dtype])
    return {"seed": torch.from_numpy(indices + store.first_seed), "states": states}


class TrajectoryDataModule(pl.LightningDataModule):
    """`pairs` trajectories to train on and `held_out` ones to select models by, from disjoint seeds.

    A batch on the device is {"noise": float32 (B, C, H, W), "label": int64 (B,), "states": float32 (B, K, C, H, W)},
    the label only where the teacher has classes. `keep`, `dtype`, `steps` and `shard_size` as in `TrajectoryStore`;
    `sampling_batch` is the teacher's batch per device. `images`: the real data, for `reference` alone.

    Errors: as `TrajectoryStore`, and ValueError for batches or held-out pairs that do not divide over the devices.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        root: str = "data/trajectories",
        pairs: int,
        held_out: int,
        batch_size: int,
        seed: int = 0,
        keep: Iterable[int] | None = None,
        dtype: str = "uint8",
        steps: int | None = None,
        shard_size: int = 1024,
        sampling_batch: int = 256,
        images: ImageDataModule | None = None,
    ):
        super().__init__()
        check_counts(pairs=pairs, held_out=held_out, batch_size=batch_size)
        check_counts(0, seed=seed)
        keep = None if keep is None else tuple(keep)
        options = {"keep": keep, "dtype": dtype, "steps": steps, "shard_size": shard_size, "batch_size": sampling_batch}
        self.train_store = TrajectoryStore(root, teacher, count=pairs, first_seed=TRAIN_SEEDS, **options)
        self.held_out_store = TrajectoryStore(root, teacher, count=held_out, first_seed=HELD_OUT_SEEDS, **options)
        self.name = teacher.name
        self.resolution = teacher.resolution
        self.channels = teacher.channels
        self.num_classes = teacher.num_classes
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
        for store in (self.train_store, self.held_out_store):
            store.fill(strategy.root_device, self.trainer.global_rank, self.trainer.world_size, strategy.barrier)
            store.spot_check(device=strategy.root_device)

    def reference(self) -> PackedImages:
        if self.images is None:
            raise ValueError(f"trajectories of {self.name} have no real images; pass images= to compare with")
        return self.images.reference()

    def train_dataloader(self) -> BatchLoader:
        fetch = partial(_fetch, self.train_store)
        return endless_loader(self.trainer, fetch, len(self.train_store), self.batch_size, self.seed)

    def val_dataloader(self) -> FixedLoader:
        fetch = partial(_fetch, self.held_out_store)
        return fixed_loader(self.trainer, fetch, len(self.held_out_store), self.batch_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        seeds, shape = batch["seed"], (self.channels, self.resolution, self.resolution)
        decoded = {"noise": sample_noise(seeds, shape), "states": decode(batch["states"].view(DTYPES[self.dtype]))}
        labels = sample_labels(seeds, self.num_classes)
        return decoded if labels is None else {**decoded, "label": labels}

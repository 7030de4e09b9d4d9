"""Image data sets as datamodules: packed once, served as whole batches, decoded and flipped on the device."""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.components.batch_loader import Batch, BatchLoader, endless_loader
from datamodules.components.packed_images import PackedImages
from stillhouse.checks import check_counts
from stillhouse.diffusion.random_numbers import RunKey, derive_seed, philox
from stillhouse.files import check_folder_name
from stillhouse.metrics.images import from_uint8

_WORD = 0xFFFFFFFF


def flips(seed: int, positions: Tensor) -> Tensor:
    """Fair coins, bool (B,), a function of the seed and the global positions (B,), int64, on every device."""
    key = derive_seed(seed, RunKey.FLIPS)
    words = philox((positions & _WORD, positions >> 32 & _WORD, 0, 0), (key & _WORD, key >> 32))
    return words[0] >> 31 == 1


def _fetch(packed: PackedImages, labelled: bool, position: int, indices: np.ndarray) -> Batch:
    images, labels = packed.fetch(indices)
    batch = {"image": images, "position": torch.arange(position, position + len(indices))}
    return {**batch, "label": labels} if labelled else batch


class ImageDataModule(pl.LightningDataModule, ABC):
    """Real images of one resolution, packed into ROOT/NAME by `prepare_data`; its attributes need no image.

    A batch on the device is {"image": float32 (B, C, H, W) in [-1, 1], "label": int64 (B,), "position": int64 (B,)}, the
    label only where there are classes and `conditional` holds. Positions count the images of all batches and devices.

    Args:
        name: Of the data set, and of its folder.
        root: The folder of all packed data sets.
        batch_size: Images per step, on all devices together.
        seed: Decides the order of the images, and which are mirrored.
        resolution: Pixels along a side.
        channels: Of an image.
        num_classes: Of the data set; 0: none.
        conditional: Whether batches have labels; without them the attribute `num_classes` is 0.
        flip: Whether half of the images are mirrored left to right.
        num_workers: Processes that load batches, which helps only where images are decoded or the disk is slow.
        verify: Whether everything packed is compared with its hashes before use, instead of a few blocks of each file; the
            same then holds for stored trajectories and degradation nodes.

    Raises:
        ValueError: For sizes other than those of the packed images, or a batch that the devices cannot divide evenly.
    """

    packed_type: ClassVar[type] = PackedImages
    """The class that reads the folder."""

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        batch_size: int,
        seed: int = 0,
        resolution: int,
        channels: int,
        num_classes: int,
        conditional: bool = True,
        flip: bool = False,
        num_workers: int = 0,
        verify: bool = False,
    ):
        super().__init__()
        check_folder_name("data.name", name, root)
        check_counts(batch_size=batch_size, resolution=resolution, channels=channels)
        check_counts(0, seed=seed, num_classes=num_classes, num_workers=num_workers)
        self.name = name
        self.folder = Path(root) / name
        self.batch_size = batch_size
        self.seed = seed
        self.resolution = resolution
        self.channels = channels
        self.classes = num_classes
        self.conditional = conditional
        self.flip = flip
        self.num_workers = num_workers
        self.verify = verify
        self._packed: PackedImages | None = None

    @property
    def num_classes(self) -> int:
        """The classes that a model is conditioned on."""
        return self.classes if self.conditional else 0

    @abstractmethod
    def convert(self, folder: Path) -> None:
        """Pack the source into `folder`, by one call of `packed_images.pack`."""

    def check_source(self) -> None:
        """Refuse a source that is missing or was changed.

        Raises:
            FileNotFoundError: The images are neither packed nor there to be packed.
            ValueError: They were packed by other options or from another source.
        """

    def class_table(self) -> str | None:
        """A line on which class is which, where the source says so by the names of its folders."""
        return None

    def prepare_data(self) -> None:
        if not self.folder.exists():
            self.convert(self.folder)

    def setup(self, stage: str) -> None:
        self.reference()

    def reference(self) -> PackedImages:
        """All real training images, with their labels if the data set has any; packs them first where that is to do."""
        if self._packed is None:
            self.prepare_data()
            packed = self.packed_type(self.folder)
            self.check_sizes(packed.meta)
            packed.verify(everything=self.verify)
            self._packed = packed
        return self._packed

    def held_out(self) -> PackedImages | None:
        """Real images of the same kind that no training sees; packs them first where that is to do. None: there are none."""
        return None

    def check_sizes(self, meta: dict[str, Any]) -> None:
        """Raise ValueError where the sizes in meta.json are not those of the options."""
        for key, option, expected in (
            ("resolution", "resolution", self.resolution),
            ("channels", "channels", self.channels),
            ("classes", "num_classes", self.classes),
        ):
            if meta[key] != expected:
                raise ValueError(
                    f"{option}={expected}, but {self.folder} was packed with {meta[key]}; "
                    f"correct the option or set another name or root"
                )

    def train_dataloader(self) -> BatchLoader:
        packed = self.reference()
        fetch = partial(_fetch, packed, self.num_classes > 0)
        return endless_loader(self.trainer, fetch, len(packed), self.batch_size, self.seed, self.num_workers)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Lightning transfers a batch before `on_train_batch_start`, hence before any seeding of that step: flips depend
        # on the position instead of the global generator.
        position, image = batch["position"], batch["image"]
        if self.flip:
            image = torch.where(flips(self.seed, position)[:, None, None, None], image.flip(-1), image)
        return {**batch, "image": from_uint8(image)}

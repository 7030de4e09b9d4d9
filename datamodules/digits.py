"""scikit-learn's handwritten digits: 1,797 real images of 8x8, no download."""

from pathlib import Path

import numpy as np

from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import pack


class Digits(ImageDataModule):
    """Ten classes, one channel. No flips by default: a mirrored digit is none."""

    def __init__(
        self,
        name: str = "digits",
        root: str = "data",
        *,
        batch_size: int,
        seed: int = 0,
        resolution: int = 8,
        channels: int = 1,
        num_classes: int = 10,
        conditional: bool = True,
        flip: bool = False,
        num_workers: int = 0,
        verify: bool = False,
    ):
        super().__init__(
            name,
            root,
            batch_size=batch_size,
            seed=seed,
            resolution=resolution,
            channels=channels,
            num_classes=num_classes,
            conditional=conditional,
            flip=flip,
            num_workers=num_workers,
            verify=verify,
        )

    def convert(self, folder: Path) -> None:
        from sklearn.datasets import load_digits  # takes a second to import, needed once

        source = load_digits()
        images = np.round(source.images * 255 / 16).astype(np.uint8)[:, None]  # grey levels are 0 .. 16
        pack(
            folder,
            images,
            len(images),
            images.shape[1:],
            labels=source.target,
            meta={
                "name": "digits",
                "classes": 10,
                "source": "sklearn.datasets.load_digits (UCI optical recognition of handwritten digits)",
                "preprocessing": "uint8 round(v * 255 / 16)",
            },
        )

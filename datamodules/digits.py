"""scikit-learn's handwritten digits: 1,797 real images of 8x8, without a download."""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import pack


class Digits(ImageDataModule):
    """All 1,797 images, grey, in ten classes; not mirrored by default, for a mirrored digit is none."""

    def __init__(self, name: str = "digits", root: str = "data", **options: Any):
        super().__init__(name, root, **{"resolution": 8, "channels": 1, "num_classes": 10, **options})

    def convert(self, folder: Path) -> None:
        from sklearn.datasets import load_digits  # takes a second to import, needed once

        digits = load_digits()
        images = np.round(digits.images * 255 / 16).astype(np.uint8)[:, None]  # grey levels are 0 .. 16
        pack(
            folder,
            images,
            len(images),
            images.shape[1:],
            labels=digits.target,
            meta={
                "name": "digits",
                "classes": 10,
                "source": "sklearn.datasets.load_digits (UCI optical recognition of handwritten digits)",
                "preprocessing": "uint8 round(v * 255 / 16)",
            },
        )

"""Points of the plane as data sets of images of shape (2, 1, 1): every method trains on them in a minute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import PackedImages, pack
from stillhouse.checks import check_choice, check_counts
from stillhouse.metrics.images import UINT8_RULE, to_uint8

_SEED = 2025  # of the points, whatever the run's seed is
_MODES = 8
_RADIUS, _STD = 0.7, 0.05
_HALF, _SQUARES = 0.9, 4  # half of the board's side, and its squares along a side


def eight_gaussians(count: int, generator: np.random.Generator) -> np.ndarray:
    """Points (count, 2), float64, of eight equally likely modes of standard deviation 0.05 on a circle of radius 0.7."""
    angles = 2 * np.pi / _MODES * generator.integers(_MODES, size=count)
    means = _RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return means + _STD * generator.standard_normal((count, 2))


def checkerboard(count: int, generator: np.random.Generator) -> np.ndarray:
    """Points (count, 2), float64, uniform on the eight dark squares of a 4x4 board in [-0.9, 0.9]^2.

    The square in the lower left corner is dark.
    """
    side = 2 * _HALF / _SQUARES
    row = generator.integers(_SQUARES, size=count)
    column = 2 * generator.integers(_SQUARES // 2, size=count) + row % 2
    return side * (np.stack([column, row], axis=1) + generator.random((count, 2))) - _HALF


DISTRIBUTIONS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


class PlanePoints(ImageDataModule):
    """Points of a distribution in the plane as images; channel 0 is x, channel 1 is y, and there are no classes.

    The points come from a seed of their own by numpy's PCG64, so they are the same everywhere; `seed` orders the batches. They
    are packed as bytes like any data set, x*127.5+128: points of a 256x256 lattice with steps of 1/127.5 = 0.008, a sixth of
    the Gaussians' standard deviation and far below what 2,000 samples can resolve.

    Args:
        distribution: A name in DISTRIBUTIONS.
        name: By default that of the distribution.
        root: As in `ImageDataModule`.
        points: How many points.
        options: The other options of `ImageDataModule`.

    Raises:
        ValueError: The distribution is unknown, or other points than those asked for are packed under this name.
    """

    def __init__(
        self, distribution: str, name: str | None = None, root: str = "data", *, points: int = 50_000, **options: Any
    ):
        check_choice("distribution", distribution, tuple(DISTRIBUTIONS))
        check_counts(points=points)
        sizes = {"resolution": 1, "channels": 2, "num_classes": 0, "conditional": False}
        super().__init__(distribution if name is None else name, root, **{**sizes, **options})
        self.distribution, self.points = distribution, points

    def convert(self, folder: Path) -> None:
        points = DISTRIBUTIONS[self.distribution](self.points, np.random.Generator(np.random.PCG64(_SEED)))
        images = to_uint8(torch.from_numpy(points)).numpy()[:, :, None, None]
        pack(
            folder,
            images,
            self.points,
            images.shape[1:],
            meta={
                "name": self.distribution,
                "classes": 0,
                "source": f"drawn by numpy's PCG64 from seed {_SEED}",
                "preprocessing": f"uint8 {UINT8_RULE}",
            },
        )

    def reference(self) -> PackedImages:
        packed = super().reference()
        for option, ours, theirs in (
            ("distribution", self.distribution, packed.meta["name"]),
            ("points", self.points, packed.meta["count"]),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{option}={ours}, but {self.folder} was packed with {theirs}; correct the option or set another name or root"
                )
        return packed

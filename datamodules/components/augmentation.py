"""EDM's augmentation of training images, non-leaking by labels (arXiv 2206.00364, appendix F.2; first in 2006.06676).

Half of the images are mirrored left to right. With the probability `augment` each, independently, they are also flipped
upside down (half of these), zoomed, rotated, stretched along one axis, and shifted. The network receives nine labels of these
changes, mirroring among them. All are zero for an unchanged image, and in sampling: the network learns from changed images
without generating any.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.diffusion.random_numbers import TrainingStream, position_noise, position_uniforms

LABELS = 9

# EDM's, in octaves of zoom and stretch, and in widths of the image.
_ZOOM, _STRETCH, _SHIFT = 0.2, 0.2, 0.125

# Daubechies' least asymmetric wavelet with 12 taps (sym6), its low-pass filter; the taps' squares sum to 1.
_TAPS = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_MIDDLE = 5  # the tap that lies on a pixel
_MARGIN = 3  # pixels around the result that the filter reads


@dataclass(frozen=True)
class Augmentation:
    """The changes of each image of a batch, in this order; all are (B,), float32, and zero for no change.

    Attributes:
        mirror: 1 where left and right are exchanged.
        flip: 1 where top and bottom are exchanged.
        zoom: In units of 0.2 octaves.
        rotation: In radians, counter-clockwise.
        stretch: In units of 0.2 octaves along `axis`; across it the image shrinks by as much.
        axis: Angle from x, in radians.
        right: Shift, in eighths of the image.
        down: Shift, in eighths of the image.
    """

    mirror: Tensor
    flip: Tensor
    zoom: Tensor
    rotation: Tensor
    stretch: Tensor
    axis: Tensor
    right: Tensor
    down: Tensor

    @property
    def labels(self) -> Tensor:
        """The labels (B, 9), float32, in the order of EDM's published networks."""
        rotated = (self.rotation.cos() - 1, self.rotation.sin())
        stretched = (self.stretch * self.axis.cos(), self.stretch * self.axis.sin())
        return torch.stack([self.mirror, self.flip, self.zoom, *rotated, *stretched, self.right, self.down], dim=1)

    def apply(self, images: Tensor) -> Tensor:
        """Apply the changes to images (B, C, R, R), float32; mirrored and flipped ones keep their values bit for bit.

        Outside of its borders an image continues as its reflection, and beyond that as grey (0).
        """
        images = torch.where(_each(self.mirror == 1), images.flip(3), images)
        images = torch.where(_each(self.flip == 1), images.flip(2), images)
        moved = self.labels[:, 2:].any(dim=1)
        with torch.autocast(images.device.type, enabled=False):
            return torch.where(_each(moved), _resampled(images, self._source_map(images.shape[-1])), images)

    def _source_map(self, resolution: int) -> Tensor:
        """The affine map (B, 2, 3) from a pixel of the result to its source, (x, y), y down, in pixels from the middle."""
        smaller = torch.exp2(-_ZOOM * self.zoom)
        along = torch.exp2(-_STRETCH * self.stretch)
        square = torch.diag_embed(torch.stack([along, 1 / along], dim=1))
        linear = smaller[:, None, None] * _turn(self.rotation - self.axis) @ square @ _turn(self.axis)
        shift = torch.stack([self.right, self.down], dim=1)[:, :, None] * (_SHIFT * resolution)
        return torch.cat([linear, -linear @ shift], dim=2)


def draw(probability: float, seed: int, positions: Tensor) -> Augmentation:
    """The augmentation at the global positions (B,), int64, a function of seed and position, on the positions' device."""
    uniforms = position_uniforms(seed, positions, TrainingStream.AUGMENTATION_UNIFORMS, count=9)
    mirror, flip, angle, axis, tilted, *chances = (u.float() for u in uniforms)
    zoomed, rotated, stretched, shifted = (u < probability for u in chances)
    zoom, stretch, right, down = position_noise(seed, positions, (4,), TrainingStream.AUGMENTATION_NORMALS).unbind(1)
    return Augmentation(
        mirror=(mirror < 0.5).float(),
        flip=(flip < probability / 2).float(),
        zoom=zoom * zoomed,
        rotation=torch.pi * (2 * angle - 1) * rotated,
        stretch=stretch * stretched,
        axis=torch.pi * (2 * axis - 1) * (tilted < 0.5),  # else x
        right=right * shifted,
        down=down * shifted,
    )


def augmented(batch: dict[str, Tensor], probability: float | None, seed: int) -> dict[str, Tensor]:
    """The batch with changed images and their labels "augment", (B, 9); the same batch where the probability is None."""
    if probability is None:
        return batch
    changes = draw(probability, seed, batch["position"])
    return {**batch, "image": changes.apply(batch["image"]), "augment": changes.labels}


def check_augment(probability: float | None, network: nn.Module) -> None:
    """Raise ValueError for what is no probability, or for a network that takes no augmentation labels."""
    if probability is None:
        return
    if not 0 < probability <= 1:
        raise ValueError(f"method.augment must be null or a probability in (0, 1], got {probability!r}")
    known = getattr(network, "augment_dim", 0)
    if known != LABELS:
        takes_it = "augment_dim" in inspect.signature(type(network)).parameters
        choose = "set that" if takes_it else "take a teacher with such a network (teacher=ffhq64)"
        raise ValueError(
            f"method.augment={probability} needs a SongUNet or DhariwalUNet with teacher.network.augment_dim={LABELS}, got a "
            f"{type(network).__name__} with {known}: {choose}, or method.augment=null"
        )


def check_unmirrored(probability: float | None, data: Any) -> None:
    """Raise ValueError where the data mirror images as well, which would be missing in the labels."""
    if probability is not None and getattr(data, "flip", False):
        raise ValueError(f"method.augment={probability} mirrors images, and tells the network: set data.flip=false")


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _turn(angle: Tensor) -> Tensor:
    """(B, 2, 2)"""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _resampled(images: Tensor, source: Tensor) -> Tensor:
    """Images (B, C, R, R) resampled at `source` (B, 2, 3), at twice the resolution, against aliasing."""
    up, down, places = _operators(images.shape[-1], images.device)
    fine = up @ images @ up.T
    points = places @ source[:, :, :2].mT[:, None] + source[:, None, None, :, 2]
    grid = (4 * points - 1) / len(up)
    return down @ F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False) @ down.T


@cache
def _operators(resolution: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of resampling at resolution R, float32.

    Returns:
        up (2 (3 R - 2), R): from a row of pixels to twice its resolution, reflected once at each end.
        down (R, 2 (R + 6)): from such a row with a margin back to R pixels.
        places (2 (R + 6), 2 (R + 6), 2): positions of its pixels, (x, y) in pixels from the middle.
    """
    last = resolution - 1
    reached = torch.arange(-last, 2 * last + 1)
    reflected = last - (last - reached.abs()).abs()
    spread = _taps(2 * reached[0] + torch.arange(2 * len(reached)), reached)
    up = torch.zeros(len(spread), resolution, dtype=torch.float64).index_add_(1, reflected, spread)
    fine = torch.arange(-2 * _MARGIN, 2 * (resolution + _MARGIN))
    down = _taps(fine, torch.arange(resolution)).T
    y, x = torch.meshgrid(*[fine.double() / 2 - last / 2] * 2, indexing="ij")
    return tuple(operator.float().to(device) for operator in (up, down, torch.stack([x, y], dim=-1)))


def _taps(fine: Tensor, coarse: Tensor) -> Tensor:
    """The filter's taps from pixels `coarse` to positions `fine`, in half pixels: (len(fine), len(coarse)), float64.

    Shifts of the filter by whole pixels are orthonormal, so that the transpose of an upsampling matrix inverts it.
    """
    tap = fine[:, None] - 2 * coarse + _MIDDLE
    inside = (tap >= 0) & (tap < len(_TAPS))
    return torch.tensor(_TAPS, dtype=torch.float64)[tap.clamp(0, len(_TAPS) - 1)] * inside

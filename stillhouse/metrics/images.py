"""The one rule by which images become bytes, and back."""

import torch
from torch import Tensor

UINT8_RULE = "x*127.5+128, clipped"


def to_uint8(x: Tensor) -> Tensor:
    """Images in about [-1, 1], any float dtype and shape, as uint8 by EDM's rule; out of range is clipped.

    Exact inverse of p / 127.5 - 1 for every byte p. Other codes use (x + 1) * 127.5, which shifts FID slightly.
    """
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Bytes of any shape as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)

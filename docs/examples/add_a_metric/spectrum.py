"""fd_spectrum: the Fréchet distance of radial power spectra, which sees blur and grain and needs no weights."""

from hashlib import sha256

import torch
from torch import Tensor

from stillhouse.metrics.images import from_uint8


class Spectrum:
    """The logarithm of an image's power at `bins` ranges of spatial frequency, from the mean to the finest detail.

    Args:
        bins: Rings of equal width between frequency zero and half a cycle per pixel.
    """

    name = "spectrum"
    metric_suffix = "_spectrum"  # of all its metrics' names: only Inception's is empty
    frechet_name = "fd"  # in the place of "fid", for features that were not learnt

    def __init__(self, bins: int = 4):
        if bins < 2:
            raise ValueError(f"evaluation.extractor.bins must be 2 or more, got {bins}")
        self.dim = bins
        self.hash = sha256(f"ln(1e-3 + mean power of the grey in {bins} rings)".encode()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, bins), float32, of uint8 images (N, C, H, W).

        Raises:
            ValueError: For images that are smaller than a ring.
        """
        side = images.shape[-1]
        if side < 2 * self.dim:
            raise ValueError(
                f"images of {side} pixels have fewer than {self.dim} rings; lower evaluation.extractor.bins"
            )
        grey = from_uint8(images).double().mean(1)
        power = torch.fft.fft2(grey, norm="ortho").abs().square().flatten(1)
        frequency = torch.fft.fftfreq(side, device=images.device, dtype=torch.float64)
        ring = (
            (torch.hypot(frequency[:, None], frequency[None]) * 2 * self.dim).long().clamp_max(self.dim - 1).flatten()
        )
        total = power.new_zeros(len(images), self.dim).index_add_(1, ring, power)
        return (total / ring.bincount() + 1e-3).log().float()

    def class_logits(self, features: Tensor) -> Tensor:
        raise ValueError("a spectrum has no classes: leave `is` out of the metrics")

    def to(self, device: torch.device | str) -> "Spectrum":
        return self

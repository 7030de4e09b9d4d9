"""The size of a loss at each noise level, learned beside it: what EDM2 (arXiv 2312.02696) and sCM weigh their losses by."""

import math

import torch
from torch import Tensor, nn

from stillhouse.networks.layers import linear, zeroed

_WAVES = 16  # of periods 4 * 8, 4 * 8 / 2, ... in ln(sigma)


class LogVariance(nn.Module):
    """The function u(sigma) of exp(-u) loss + u, which is least where exp(u) is the loss to be expected; it starts at zero.

    One linear layer on sines and cosines of ln(sigma) / 4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.arange(_WAVES) * (math.pi / 4), persistent=False)
        self.layer = zeroed(linear(2 * _WAVES, 1))

    def forward(self, sigma: Tensor) -> Tensor:
        """Compute u (B,), float32, of noise levels (B,)."""
        with torch.autocast(sigma.device.type, enabled=False):
            angles = (sigma.log() / 4).float()[:, None] * self.freqs
            return self.layer(torch.cat([angles.cos(), angles.sin()], dim=1)).flatten()

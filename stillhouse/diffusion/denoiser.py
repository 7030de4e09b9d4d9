"""The one language of this project: a denoiser D(x, sigma, labels) -> estimate of x0."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillhouse.diffusion.preconditioning import Coefficients, Preconditioning
from stillhouse.networks.branching import reading_all

DenoiserFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Denoiser(nn.Module):
    """A raw network read through a preconditioning.

    Sigma, coefficients and the combination with x stay in the precision of x (float64, else float32) whatever autocast
    does; the network itself sees float32 and runs under the caller's autocast.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning):
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W): data in [-1, 1] plus noise of level sigma, a scalar or (B,); labels (B,) int64 or None.

        augment_labels (B, network.augment_dim): what was done to the data, in training alone.
        Returns the estimate of x0 with the shape of x, in float64 if x is, else in float32.
        """
        x, c, inputs = self._read(x, sigma)
        return c.skip * x + c.out * self.network(*inputs, *_told(labels, augment_labels)).to(x.dtype)

    def branches(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """All K estimates (B, K, C, H, W) of a network with K branches, the last one that of `forward`; arguments as there."""
        x, c, inputs = self._read(x, sigma)
        with reading_all(self.network):
            out = self.network(*inputs, labels)
        out = out.to(x.dtype).unflatten(1, (-1, x.shape[1]))
        return (c.skip * x)[:, None] + c.out[:, None] * out

    def first_branch(
        self, inputs: Tensor, noise_labels: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The network's own output (B, C, H, W), float32, in its first branch, of its own inputs; see `diffusion.flow`."""
        with reading_all(self.network):
            out = self.network(inputs.float(), noise_labels.float(), *_told(labels, augment_labels))
        return out[:, : inputs.shape[1]].float()

    def encode(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's features (B, D, h, w) of x at the end of its encoder; arguments as for the estimate."""
        *_, inputs = self._read(x, sigma)
        return self.network.encode(*inputs, labels)

    def _read(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Coefficients, tuple[Tensor, Tensor]]:
        """x in the precision of the estimate, its coefficients, and what the network is given beside labels."""
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        c = self.preconditioning(sigma.to(x).expand(len(x))[:, None, None, None])
        return x, c, ((c.in_ * x).float(), c.noise.flatten().float())


def _told(labels: Tensor | None, augment_labels: Tensor | None) -> tuple[Tensor | None, ...]:
    # Networks that know no augmentation need not take its labels.
    return (labels,) if augment_labels is None else (labels, augment_labels)

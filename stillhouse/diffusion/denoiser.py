"""The one language of this project: a denoiser D(x, sigma, labels) is an estimate of x0 from x = x0 + sigma e."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillhouse.diffusion.preconditioning import Coefficients, Preconditioning
from stillhouse.networks.branching import reading_all

DenoiserFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Denoiser(nn.Module):
    """A network that is read through a preconditioning.

    Sigma, coefficients and the combination with x stay in the precision of x (float64, else float32) whatever autocast
    does; the network itself sees float32 and runs under the caller's autocast.

    Args:
        network: see `stillhouse.networks`.
        preconditioning: its coefficients.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning):
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor:
        """Estimate x0.

        Args:
            x: data in [-1, 1] plus noise (B, C, H, W).
            sigma: the noise level, a scalar or (B,).
            labels: classes (B,), int64, or None.
            augment_labels: what was done to the data (B, network.augment_dim), in training alone.
            until: of a network of two times the noise level, like sigma, to which a straight line from x towards the estimate
                follows the flow; None: zero, where the estimate is a sample.

        Returns:
            The estimate, of the shape of x, in float64 if x is, else in float32.
        """
        x, c, inputs = self._read(x, sigma)
        output = self.network(*inputs, *_condition(labels, augment_labels), **self._span(x, sigma, until))
        return c.skip * x + c.out * output.to(x.dtype)

    def branches(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make all K estimates (B, K, C, H, W) of a network with K branches; arguments as of `forward`, which is the last."""
        x, c, inputs = self._read(x, sigma)
        with reading_all(self.network):
            out = self.network(*inputs, labels)
        out = out.to(x.dtype).unflatten(1, (-1, x.shape[1]))
        return (c.skip * x)[:, None] + c.out[:, None] * out

    def first_branch(
        self,
        inputs: Tensor,
        noise_labels: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        span: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network's first branch without preconditioning, for `stillhouse.diffusion.flow`.

        Args:
            inputs: what the network reads (B, C, H, W).
            noise_labels: c_noise (B,).
            labels: classes (B,), int64, or None.
            augment_labels: as of `forward`.
            span: of flow time to a second one (B,), of a network of two times; None: zero.

        Returns:
            The output (B, C, H, W), float32.
        """
        inputs, noise_labels = inputs.float(), noise_labels.float()
        if span is None and self.two_times:
            span = torch.zeros_like(noise_labels)
        times = {} if span is None else {"span": span.float()}
        with reading_all(self.network):
            out = self.network(inputs, noise_labels, *_condition(labels, augment_labels), **times)
        return out[:, : inputs.shape[1]].float()

    @property
    def two_times(self) -> bool:
        """Whether the network is conditioned on a second time (`stillhouse/networks/second_time.py`)."""
        return getattr(self.network, "two_times", False)

    def encode(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the network's features (B, D, h, w) of x at the end of its encoder; arguments as of `forward`."""
        *_, inputs = self._read(x, sigma)
        return self.network.encode(*inputs, labels)

    def with_features(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Estimate x0 as `forward` does, and give the features of `encode` from the same evaluation."""
        x, c, inputs = self._read(x, sigma)
        output, features = self.network(*inputs, labels, both=True)
        return c.skip * x + c.out * output.to(x.dtype), features

    def _read(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Coefficients, tuple[Tensor, Tensor]]:
        """Bring x to the estimate's precision, and compute its coefficients and the network's inputs beside labels."""
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        c = self.preconditioning(sigma.to(x).expand(len(x))[:, None, None, None])
        return x, c, ((c.in_ * x).float(), c.noise.flatten().float())

    def _span(self, x: Tensor, sigma: Tensor, until: Tensor | None) -> dict[str, Tensor]:
        """Compute the span of flow time, t = 1 / (1 + sigma), from sigma to `until`, as the network takes it."""
        if not self.two_times:
            if until is not None:
                raise ValueError(
                    "this network has one time, and no answer to `until`: condition_on_second_time(network)"
                )
            return {}
        ends = sigma.new_zeros(()) if until is None else until
        span = 1 / (1 + ends.to(x)) - 1 / (1 + sigma.to(x))
        return {"span": span.expand(len(x)).float()}


def _condition(labels: Tensor | None, augment_labels: Tensor | None) -> tuple[Tensor | None, ...]:
    # Networks that know no augmentation need not take its labels.
    return (labels,) if augment_labels is None else (labels, augment_labels)

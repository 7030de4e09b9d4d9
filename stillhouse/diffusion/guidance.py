"""Guidance: a denoiser that goes on from a weaker one's estimate through its own, and beyond it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import Preconditioning


class GuidedDenoiser(nn.Module):
    """The guided estimate D_g + w (D - D_g), which is D itself at w = 1.

    D_g is the same network without labels (classifier-free guidance, arXiv 2207.12598, with w for its 1 + w), or a second
    denoiser: one that is trained without labels, or a worse one of the same data (autoguidance, arXiv 2406.02507). With an
    interval (arXiv 2404.07724) it is D at noise levels outside of it.

    Args:
        denoiser: D.
        weight: w.
        interval: the lowest noise level, which is excluded, and the highest, at which D is guided; None: at all.
        guide: D_g; None: D without labels.
        guide_conditional: whether the guide is given labels.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: float,
        interval: Sequence[float] | None = None,
        guide: Denoiser | None = None,
        guide_conditional: bool = False,
    ):
        super().__init__()
        self.unguided = denoiser
        self.weight = float(weight)
        self.interval = None if interval is None else tuple(map(float, interval))
        self.guide = guide
        self.guide_conditional = guide_conditional
        self._active = True

    @property
    def network(self) -> nn.Module:
        """D's."""
        return self.unguided.network

    @property
    def preconditioning(self) -> Preconditioning:
        """D's."""
        return self.unguided.preconditioning

    def set_active(self, active: bool) -> None:
        """Guide from now on, or be D itself."""
        self._active = active

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate x0; arguments as of `Denoiser.forward`."""
        return self.combine(lambda denoiser, seen: denoiser(x, sigma, seen), sigma, labels)

    def combine(
        self, evaluate: Callable[[Denoiser, Tensor | None], Tensor], sigma: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Combine what two denoisers say, estimates or velocities of a flow.

        Where all noise levels are one, a scalar, outside of the interval, the guide is not evaluated. To know that, the level
        is read from the device, a shorter wait than the evaluation that it saves.

        Args:
            evaluate: from a denoiser and the labels that it is given to what it says (B, ...).
            sigma: the noise level, a scalar or (B,).
            labels: classes (B,), int64, or None.

        Returns:
            The guided (B, ...).
        """
        strong = evaluate(self.unguided, labels)
        if not self._active or (sigma.ndim == 0 and self.interval is not None and not self.guides_at(sigma.item())):
            return strong
        weak = evaluate(self.guide or self.unguided, labels if self.guide_conditional else None)
        guided = weak + self.weight * (strong - weak)
        if self.interval is None or sigma.ndim == 0:
            return guided
        least, most = self.interval
        inside = (sigma > least) & (sigma <= most)
        return torch.where(inside.view(-1, *[1] * (strong.ndim - 1)), guided, strong)

    def guides_at(self, sigma: float) -> bool:
        """Whether a noise level lies in the interval."""
        return self.interval is None or self.interval[0] < sigma <= self.interval[1]

    def description(self) -> dict[str, Any]:
        """Describe the guidance as plain data, without the networks."""
        return {"weight": self.weight, "interval": self.interval, "labels": self.guide_conditional}


def check_guidance(guidance: float | None, interval: Sequence[float] | None, has_guide: bool) -> None:
    """Refuse options of a teacher's guidance that say nothing.

    Args:
        guidance: the weight, None for none.
        interval: of noise levels, or None.
        has_guide: whether there is a second network.

    Raises:
        ValueError: for impossible values, and options without a weight.
    """
    if guidance is None:
        if has_guide or interval is not None:
            option = "guide" if has_guide else "guidance_interval"
            raise ValueError(f"teacher.{option} needs a weight: say teacher.guidance=1.5, or leave it out")
        return
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"teacher.guidance must not be negative, got {guidance!r}; 1 is a teacher without guidance")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(
            f"teacher.guidance_interval={list(interval)} must be two noise levels, the lower first, such as [0.3,5]"
        )

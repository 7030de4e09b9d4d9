"""How noise becomes images, in plain numbers: what an exported student carries to where this project is not installed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import DenoiserFunction
from stillhouse.diffusion.solvers import SOLVERS, analytic_step


@dataclass(frozen=True)
class Sampling:
    """A solver's path over `sigmas`, descending, from unit normal noise times `scale`.

    options: the solver's. analytic_first: the first step takes no evaluation (`analytic_step`). clip: estimates are clipped to
    [-1, 1]. double: states are float64, else float32; the network sees float32 in any case.
    """

    sigmas: Sequence[float]
    scale: float
    solver: str = "euler"
    options: Mapping[str, Any] = field(default_factory=dict)
    analytic_first: bool = False
    clip: bool = False
    double: bool = True

    def __call__(self, denoiser: DenoiserFunction, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), float32 in about [-1, 1], of unit normal noise of that shape and labels (B,), int64, or None."""

        def estimate(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            found = denoiser(x, sigma, labels)
            return found.clamp(-1, 1) if self.clip else found

        x = (noise.double() if self.double else noise.float()) * self.scale
        levels = torch.tensor(self.sigmas, dtype=torch.float64)
        if self.analytic_first:
            x, levels = analytic_step(x, *self.sigmas[:2]), levels[1:]
        if levels.tolist()[1:] == [0.0]:  # of any solver the estimate, but for what rounding does to a large sigma
            return estimate(x, x.new_full((), levels[0].item()), labels).float()
        for x in SOLVERS[self.solver].solve(estimate, x, levels, labels, **self.options):  # noqa: B007, B020
            pass
        return x.float()

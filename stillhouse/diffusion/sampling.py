"""How noise becomes images, as plain data: what a student says of itself, and what an exported one carries along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser, DenoiserFunction
from stillhouse.diffusion.solvers import SOLVERS, analytic_step, evaluations


@dataclass(frozen=True)
class Sampling:
    """A solver's path along noise levels, from unit normal noise to an image. All fields can be written as JSON.

    Attributes:
        sigmas: noise levels, descending; the last one, at which the images are, is zero in most cases.
        scale: the standard deviation of the starting state: noise times `scale` is the state at sigmas[0].
        solver: a name of `stillhouse.diffusion.solvers.SOLVERS`, such as "euler" or "renoising".
        options: the solver's keyword arguments.
        analytic_first: whether the first step takes no evaluation (`analytic_step`).
        clip: whether estimates are clipped to [-1, 1].
        double: whether states are float64, else float32. The network sees float32 in any case.
    """

    sigmas: Sequence[float]
    scale: float
    solver: str = "euler"
    options: Mapping[str, Any] = field(default_factory=dict)
    analytic_first: bool = False
    clip: bool = False
    double: bool = True

    @property
    def nfe(self) -> int:
        """Network evaluations of one image."""
        per_step, steps = SOLVERS[self.solver].evaluations, len(self.sigmas) - 1 - self.analytic_first
        return per_step * steps if self.sigmas[-1] else evaluations(self.solver, steps)

    def plain(self) -> dict[str, Any]:
        """List the fields as JSON can say them."""
        return vars(self) | {"sigmas": list(self.sigmas), "options": dict(self.options)}

    def __call__(self, denoiser: DenoiserFunction, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make images of noise; each is a function of its own noise and label, whatever the batch around it.

        Args:
            denoiser: the estimate of x0.
            noise: unit normal noise (B, C, H, W).
            labels: classes (B,), int64, or None.

        Returns:
            Images (B, C, H, W), float32 in about [-1, 1].
        """

        def estimate(x: Tensor, sigma: Tensor, labels: Tensor | None, **until: Tensor) -> Tensor:
            x0 = denoiser(x, sigma, labels, **until)
            return x0.clamp(-1, 1) if self.clip else x0

        x = (noise.double() if self.double else noise.float()) * self.scale
        levels = torch.tensor(self.sigmas, dtype=torch.float64)
        if self.analytic_first:
            x, levels = analytic_step(x, *self.sigmas[:2]), levels[1:]
        if levels.tolist()[1:] == [0.0]:  # of any solver the estimate, but for what rounding does to a large sigma
            return estimate(x, x.new_full((), levels[0].item()), labels).float()
        for x in SOLVERS[self.solver].solve(estimate, x, levels, labels, **self.options):  # noqa: B007, B020
            pass
        return x.float()


def one_step(denoiser: Denoiser, noise: Tensor, sigma_init: float, labels: Tensor | None) -> Tensor:
    """Generate images G(z) = D(sigma_init z, sigma_init).

    Args:
        denoiser: D.
        noise: unit normal z (B, C, H, W).
        sigma_init: the noise level at which D is evaluated.
        labels: classes (B,), int64, or None.

    Returns:
        Images (B, C, H, W).
    """
    sigma = noise.new_full((), sigma_init)
    return denoiser(noise * denoiser.preconditioning.prior_std(sigma), sigma, labels)


def one_step_sampling(denoiser: Denoiser, sigma_init: float) -> Sampling:
    """Describe `one_step` as plain data."""
    scale = denoiser.preconditioning.prior_std(torch.tensor(sigma_init)).item()
    return Sampling((sigma_init, 0.0), scale, double=False)

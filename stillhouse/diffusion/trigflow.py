"""TrigFlow in the one language (sCM, arXiv 2410.11081): x_t = cos(t) x0 + sin(t) z, with z of the data's standard deviation s.

Divided by cos(t) it is x = x0 + sigma e at noise level sigma = s tan(t). A denoiser is D = cos(t) x_t - sin(t) s F(x_t / s, t),
and dx_t/dt = s F along the probability-flow ODE. t runs from data, 0, to noise, pi / 2.
"""

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.flow import per_sample
from stillhouse.diffusion.guidance import GuidedDenoiser


def angle_of(sigma: Tensor, sigma_data: float) -> Tensor:
    """Convert noise levels (B,) to times t in (0, pi / 2), float64."""
    return torch.atan(sigma.double() / sigma_data)


def trigflow_output(
    denoiser: Denoiser | GuidedDenoiser, x: Tensor, t: Tensor, sigma_data: float, labels: Tensor | None
) -> Tensor:
    """Compute F(x_t / s, t), for EDM's preconditioning minus the network's output, without the division of a small difference.

    Args:
        denoiser: D.
        x: states x_t (B, C, H, W), float64.
        t: times (B,), float64 in (0, pi / 2).
        sigma_data: s.
        labels: classes (B,), int64, or None.

    Returns:
        (B, C, H, W), float64.
    """
    if isinstance(denoiser, GuidedDenoiser):
        return denoiser.combine(
            lambda part, seen: trigflow_output(part, x, t, sigma_data, seen), sigma_data * t.tan(), labels
        )
    cos, sin = t.cos(), t.sin()
    c = denoiser.preconditioning(sigma_data * t.tan())
    # F = (cos(t) x_t - D) / (s sin(t)) with D = c_skip x_t / cos(t) + c_out (the network's output).
    from_state, from_network = (cos - c.skip / cos) / (sigma_data * sin), -c.out / (sigma_data * sin)
    out = denoiser.first_branch(per_sample(c.in_ / cos, x) * x, c.noise, labels)
    return per_sample(from_state, x) * x + per_sample(from_network, x) * out

"""Sampling schedules: functions of the number of steps n.

Each returns n + 1 noise levels, float64 on the CPU, strictly descending, the last one zero, and raises ValueError for
impossible numbers. `karras_grid` alone ends above zero: it is the grid that a trajectory is distilled on.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOG_SNR_CLIP = 20.0  # progressive distillation's cut of the cosine schedule, arXiv 2202.00512


def _to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check(steps: int, most: int | None = None, name: str = "solver steps") -> None:
    if not isinstance(steps, int) or steps < 1 or (most is not None and steps > most):
        limit = f"between 1 and {most}" if most is not None else "at least 1"
        raise ValueError(f"the number of {name} must be {limit}, got {steps!r}")


def _karras_levels(count: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho}")
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Make levels that are linear in sigma^(1/rho) from sigma_max to sigma_min, then zero (EDM equation 5)."""
    _check(steps)
    return _to_zero(_karras_levels(steps, sigma_min, sigma_max, rho))


def few_levels(steps: int, levels: Sequence[float]) -> Tensor:
    """Take the first `steps` of a few-step student's published levels, descending, then zero.

    Raises:
        ValueError: for more steps than there are levels.
    """
    _check(steps)
    if steps > len(levels):
        known = ", ".join(str(count) for count in range(1, len(levels) + 1))
        raise ValueError(f"steps={steps}: this published student is sampled in {known} and no other number of steps")
    return _to_zero(torch.tensor(list(levels)[:steps], dtype=torch.float64))


def karras_grid(intervals: int, sigma_min: float = 0.006, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Make the levels 0 .. `intervals` of EDM's equation 5, from sigma_max to sigma_min (both to rounding) and no zero after.

    The defaults are those of SFD (arXiv 2409.19681), whose `num_steps` counts levels: intervals + 1. A grid of
    intervals * substeps intervals passes through the levels of the coarse one, but computed anew these differ in their
    last bits. Where levels must be the same numbers (a student's times on its teacher's grid), take the coarse grid
    from the fine one by index: `karras_grid(intervals * substeps)[::substeps]`.
    """
    _check(intervals, name="intervals")
    return _karras_levels(intervals + 1, sigma_min, sigma_max, rho)


def log_snr_uniform(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Make levels that are uniform in the log-SNR -2 ln(sigma) from sigma_max to sigma_min, then zero."""
    _check(steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
    return _to_zero(torch.logspace(math.log10(sigma_max), math.log10(sigma_min), steps, dtype=torch.float64))


def cosine_uniform(steps: int) -> Tensor:
    """Make levels that are uniform in the time u of the cosine schedule, then zero.

    With the log-SNR cut to +-20, sigma = tan(a u + b) for u = 1 .. 1/n.
    """
    _check(steps)
    low = math.atan(math.exp(-LOG_SNR_CLIP / 2))
    high = math.atan(math.exp(LOG_SNR_CLIP / 2))
    u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    return _to_zero(torch.tan(low + (high - low) * u))


def flow_uniform(steps: int, t_start: float = 1e-3) -> Tensor:
    """Make levels that are uniform in the time t of a rectified flow: sigma = (1 - t) / t.

    From t_start, where the released code starts, to 1.
    """
    _check(steps)
    if not 0 < t_start < 1:
        raise ValueError(f"t_start must lie in (0, 1), got {t_start}")
    t = torch.linspace(t_start, 1, steps + 1, dtype=torch.float64)[:-1]
    return _to_zero((1 - t) / t)


def ddpm_sigmas(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Compute sigma = sqrt((1 - abar) / abar) at every index of DDPM's linear beta schedule: (timesteps,), ascending."""
    if timesteps < 2 or not 0 < beta_start < beta_end < 1:
        raise ValueError(
            f"need timesteps >= 2 and 0 < beta_start < beta_end < 1, got {timesteps}, {beta_start}, {beta_end}"
        )
    signal = torch.cumprod(1 - torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64), 0)
    return ((1 - signal) / signal).sqrt()


def ddim_uniform(steps: int, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Take DDIM's evenly spaced indices 0, c, 2c, ... with c = timesteps // n, from the top (arXiv 2010.02502)."""
    _check(steps, timesteps)
    table = ddpm_sigmas(timesteps, beta_start, beta_end)
    return _to_zero(table[torch.arange(steps) * (timesteps // steps)].flip(0))


def ddim_quadratic(steps: int, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Take DDIM's quadratically spaced indices int(linspace(0, sqrt(0.8 timesteps), n)^2), from the top.

    For many steps several entries round to the same index; these evaluations change nothing and are left out, so that
    the schedule can hold fewer than n steps (96 of 100 in Denoising Student's CIFAR-10 setting).
    """
    _check(steps, timesteps)
    table = ddpm_sigmas(timesteps, beta_start, beta_end)
    roots = torch.linspace(0, math.sqrt(0.8 * timesteps), steps, dtype=torch.float64)
    # linspace misses its end by an ulp, which would round 800 down to 799.
    indices = (roots**2 + 1e-9).long().unique()
    return _to_zero(table[indices].flip(0))

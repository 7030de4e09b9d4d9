"""Samplers: from noise to images along descending noise levels, as pure functions.

All but `renoising` and `ancestral` solve the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma (EDM equation 3).
Each is a generator over `sigmas` (n + 1 levels, descending, on the CPU) that yields the state after every step, so that a
caller keeps only what it needs. States have the dtype of x; the steps themselves are Python floats (double precision). A call
checks the options and evaluates nothing: the first evaluation is made when the first state is asked for.

Noise that is added on the way is a function of each sample's own starting state: independent of the batch around it, of
the process and of the device. A further kind of sampling is one more function here and its line in `SOLVERS`; students
(`Sampling`), teachers and exported models then know it by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser, DenoiserFunction
from stillhouse.diffusion.multistep import dpm_solver_pp
from stillhouse.diffusion.random_numbers import sample_noise


def euler_step(x: Tensor, estimate: Tensor, sigma: float | Tensor, following: float | Tensor) -> Tensor:
    """Step on the straight line from x, at noise level sigma > 0, towards the estimate of x0.

    Levels are floats, or tensors of x's dtype that broadcast against x and its estimate: (B, 1, 1, 1) for a level per
    sample, and x (B, 1, C, H, W) with an estimate (B, K, C, H, W) and following (K, 1, 1, 1) for K branches.

    Args:
        x: the state (B, C, H, W).
        estimate: of x0.
        sigma: the level of x.
        following: the level to go to.

    Returns:
        The state at the level `following`.
    """
    return x + (following - sigma) * ((x - estimate) / sigma)


def analytic_step(x: Tensor, sigma: float | Tensor, following: float | Tensor) -> Tensor:
    """Take an Euler step without an evaluation: at large noise dx/dsigma is nearly x / sqrt(1 + sigma^2), the noise itself.

    The analytic first step (AFS) of GENIE (arXiv 2210.05475), where x_T stands for the first noise prediction. Arguments
    as of `euler_step`.
    """
    return x + (following - sigma) * (x / (1 + sigma**2) ** 0.5)


def ancestral_step(
    x: Tensor, estimate: Tensor, sigma: float | Tensor, following: float | Tensor, noise: Tensor
) -> Tensor:
    """Sample the state at a lower level from its distribution q(x' | x, x0), given the state and the clean image.

    It is normal, with r = sigma'^2 / sigma^2, mean r x + (1 - r) x0 and variance sigma'^2 (1 - r): the reverse step of DDPM
    (arXiv 2006.11239, equation 7), between any two levels.

    Args:
        x: the state (B, C, H, W).
        estimate: x0.
        sigma: the level of x, a float or (B, 1, 1, 1).
        following: the level to go to, at most sigma.
        noise: unit normal, of the state's shape.

    Returns:
        The state at the level `following`.
    """
    kept = (following / sigma) ** 2
    return kept * x + (1 - kept) * estimate + following * (1 - kept) ** 0.5 * noise


def _direction(denoiser: DenoiserFunction, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    return (x - denoiser(x, x.new_full((), sigma), labels)) / sigma


def euler(denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Solve by Euler steps: first order, one evaluation a step.

    In this coordinate it is DDIM and, between the same two times, a flow's Euler step. On `flow_uniform` n steps cover
    [0.001, 1], where rectified flow's released code begins there too and goes by 1 / n.

    Args:
        denoiser: the estimate of x0.
        x: the starting state (B, C, H, W), at the level sigmas[0].
        sigmas: the noise levels (n + 1,).
        labels: classes (B,), int64, or None.

    Returns:
        The states after each step.
    """
    levels = sigmas.tolist()
    for sigma, following in pairwise(levels):
        x = euler_step(x, denoiser(x, x.new_full((), sigma), labels), sigma, following)
        yield x


def heun(denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Solve by Heun's method (EDM algorithm 1): second order, two evaluations a step; a step to sigma = 0 is an Euler step."""
    return stochastic_heun(denoiser, x, sigmas, labels, s_churn=0)


def stochastic_heun(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    s_churn: float,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Tensor]:
    """Solve by Heun's method with noise added back before each step (EDM algorithm 2).

    Args:
        denoiser, x, sigmas, labels: as of `euler`.
        s_churn: the amount of noise over all steps, not negative; 0 is `heun`.
        s_min: the lowest level at which noise is added.
        s_max: the highest level at which noise is added.
        s_noise: the standard deviation of the added noise, positive.

    Returns:
        The states after each step.

    Raises:
        ValueError: for impossible options, at the call and not at the first state.
    """
    if s_churn < 0 or s_noise <= 0 or s_min > s_max:
        raise ValueError(f"need s_churn >= 0, s_noise > 0, s_min <= s_max; got {s_churn}, {s_noise}, {s_min}, {s_max}")
    return _churned_heun(denoiser, x, sigmas, labels, s_churn, s_min, s_max, s_noise)


def _churned_heun(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None,
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> Iterator[Tensor]:
    levels = sigmas.tolist()
    seeds = _latent_seeds(x) if s_churn else None
    gamma = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
    for step, (sigma, following) in enumerate(pairwise(levels)):
        if seeds is not None and s_min <= sigma <= s_max:
            raised = sigma * (1 + gamma)
            noise = sample_noise(seeds, x.shape[1:], stream=step)
            x = x + math.sqrt(raised**2 - sigma**2) * s_noise * noise.to(x)
            sigma = raised
        slope = _direction(denoiser, x, sigma, labels)
        euler_state = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + _direction(denoiser, euler_state, following, labels)) / 2
            x = x + (following - sigma) * slope
        else:
            x = euler_state
        yield x


def flow_heun(denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Solve by Heun's method in the time of a rectified flow, t = 1 / (1 + sigma), on its state z = t x.

    `heun` averages slopes in sigma, whose first step on a flow's grid, from 999, covers nearly all of it; here the
    average is over t. Two evaluations a step but the last one, which is an Euler step.
    """

    def slope(z: Tensor, sigma: float) -> Tensor:
        t = 1 / (1 + sigma)
        return (denoiser(z / t, z.new_full((), sigma), labels) - z) / (1 - t)

    levels = sigmas.tolist()
    z = x / (1 + levels[0])
    for sigma, following in pairwise(levels):
        span = 1 / (1 + following) - 1 / (1 + sigma)
        first = slope(z, sigma)
        euler_state = z + span * first
        z = z + span * (first + slope(euler_state, following)) / 2 if following > 0 else euler_state
        yield z * (1 + following)


def renoising(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    sigma_min: float = 0.0,
) -> Iterator[Tensor]:
    """Sample as consistency models do (arXiv 2303.01469, algorithm 1): estimate, add noise of the next level, and again.

    x' = D(x, sigma) + sqrt(sigma'^2 - sigma_min^2) e; the last step, to sigma' = 0, is the estimate alone. With the exact
    consistency function for D, which maps noised data of any level to level sigma_min, every state has the distribution
    of data at its level.

    Args:
        denoiser: the consistency function, or another estimate of a clean image.
        x, sigmas, labels: as of `euler`.
        sigma_min: the noise level of an estimate.

    Returns:
        The states after each step.

    Raises:
        ValueError: for a negative sigma_min, or levels below it, at the call and not at the first state.
    """
    if sigma_min < 0:
        raise ValueError(f"sigma_min must not be negative, got {sigma_min!r}")
    if sigmas is not None and (sigmas[sigmas > 0] < sigma_min).any():
        raise ValueError(f"noise levels must be at least sigma_min={sigma_min!r}, got {sigmas.tolist()}")
    return _renoised(denoiser, x, sigmas, labels, sigma_min)


def _renoised(
    denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None, sigma_min: float
) -> Iterator[Tensor]:
    seeds = _latent_seeds(x)
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        x = denoiser(x, x.new_full((), sigma), labels)
        if following > 0:
            noise = sample_noise(seeds, x.shape[1:], stream=step)
            x = x + math.sqrt(following**2 - sigma_min**2) * noise.to(x)
        yield x


def ancestral(denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Sample as DDPM does, by `ancestral_step` with the estimate for the clean image; the last step, to zero, is the estimate.

    Where each estimate is a sample of the clean images that a state may come from, every state has the distribution of data
    at its level.

    Args:
        denoiser, x, sigmas, labels: as of `euler`.

    Returns:
        The states after each step.
    """
    seeds = _latent_seeds(x)
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        estimate = denoiser(x, x.new_full((), sigma), labels)
        if following > 0:
            noise = sample_noise(seeds, x.shape[1:], stream=step)
            estimate = ancestral_step(x, estimate, sigma, following, noise.to(x))
        x = estimate
        yield x


def jumps(denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Jump from level to level by a network of two times, which is told where each step ends (MeanFlow, arXiv 2505.13447).

    Its estimate stands where the flow's mean velocity between both times would lead in the time that is left, so an Euler step
    towards it ends on the flow: X_r = X_t + (r - t) u(X_t, t, r) in flow time.

    Args:
        denoiser: of two times.
        x, sigmas, labels: as of `euler`.

    Returns:
        The states after each step.
    """
    for sigma, following in pairwise(sigmas.tolist()):
        estimate = denoiser(x, x.new_full((), sigma), labels, until=x.new_full((), following))
        x = euler_step(x, estimate, sigma, following)
        yield x


def _latent_seeds(x: Tensor) -> Tensor:
    """Make a seed per sample (B,), int64, of the bits of the first and the last value of its starting state, as float32."""
    low, high = x.flatten(1)[:, 0], x.flatten(1)[:, -1]
    bits = torch.stack([low, high]).float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return bits[0] | bits[1] << 32


class Solver(NamedTuple):
    """A sampler and its cost."""

    solve: Callable[..., Iterator[Tensor]]
    evaluations: int  # of the network per step; the last step, to sigma = 0, takes one
    two_times: bool = False  # whether it is for networks of two times, which no teacher is


SOLVERS = {
    "euler": Solver(euler, 1),
    "heun": Solver(heun, 2),
    "stochastic_heun": Solver(stochastic_heun, 2),
    "flow_heun": Solver(flow_heun, 2),
    "dpm_solver_pp": Solver(dpm_solver_pp, 1),
    "renoising": Solver(renoising, 1),
    "ancestral": Solver(ancestral, 1),
    "jumps": Solver(jumps, 1, two_times=True),
}


def check_solver(owner: str, solver: str, options: Mapping[str, Any]) -> None:
    """Refuse a solver or its options before anything is evaluated.

    Args:
        owner: the part of the configuration that the options belong to, for the message.
        solver: a name of `SOLVERS`.
        options: the solver's keyword arguments.

    Raises:
        ValueError: for an unknown solver, or options that it lacks or cannot take.
    """
    teachers = [name for name, known in SOLVERS.items() if not known.two_times]
    if solver not in teachers:
        raise ValueError(f"{owner}.solver={solver!r} is unknown; choose one of {', '.join(teachers)}")
    try:
        SOLVERS[solver].solve(None, None, None, None, **options)  # checks the options and evaluates nothing
    except (TypeError, ValueError) as error:
        text = f"{owner}.solver_options={dict(options)} do not fit the solver {solver!r}: {error} (null: no options)"
        raise ValueError(text) from None


def evaluations(solver: str, steps: int) -> int:
    """Count the network evaluations (NFE) of `steps` steps that end at sigma = 0."""
    return SOLVERS[solver].evaluations * (steps - 1) + 1

"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma (EDM equation 3), as pure functions.

Each is a generator over `sigmas` (n + 1 levels, descending, on the CPU) that yields the state after every step, so that
a caller keeps only what it needs. States have the dtype of x; the steps themselves are Python floats (double precision).
A call checks the options and touches nothing else: the first evaluation is made when the first state is asked for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import DenoiserFunction
from stillhouse.diffusion.multistep import dpm_solver_pp
from stillhouse.diffusion.random_numbers import sample_noise


def euler_step(x: Tensor, estimate: Tensor, sigma: float | Tensor, following: float | Tensor) -> Tensor:
    """The state at noise level `following` on the straight line from x, at level sigma > 0, towards the estimate of x0.

    The levels are floats, or tensors of x's dtype that broadcast against x and its estimate: (B, 1, 1, 1) for a level
    per sample, and x (B, 1, C, H, W) with an estimate (B, K, C, H, W) and following (K, 1, 1, 1) for K branches.
    """
    return x + (following - sigma) * ((x - estimate) / sigma)


def analytic_step(x: Tensor, sigma: float | Tensor, following: float | Tensor) -> Tensor:
    """An Euler step without an evaluation: at large noise dx/dsigma is nearly x / sqrt(1 + sigma^2), the noise itself.

    The analytic first step (AFS) of GENIE (arXiv 2210.05475), where x_T stands for the first noise prediction. Levels
    as in `euler_step`.
    """
    return x + (following - sigma) * (x / (1 + sigma**2) ** 0.5)


def _direction(denoiser: DenoiserFunction, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    return (x - denoiser(x, x.new_full((), sigma), labels)) / sigma


def euler(denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """First order, one evaluation a step. In this coordinate it is DDIM and, between the same two times, a flow's Euler step.

    On `flow_uniform` n steps cover [0.001, 1], where rectified flow's released code begins there too and goes by 1 / n.
    """
    levels = sigmas.tolist()
    for sigma, following in pairwise(levels):
        x = euler_step(x, denoiser(x, x.new_full((), sigma), labels), sigma, following)
        yield x


def heun(denoiser: DenoiserFunction, x: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
    """Second order, two evaluations a step but the last one to sigma = 0, which is an Euler step (EDM algorithm 1)."""
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
    """Heun with noise added back before each step (EDM algorithm 2).

    The added noise of a sample is a function of its own starting latent, so it does not depend on the batch around it.

    Errors: ValueError for impossible options, at the call and not at the first state.
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
    """Heun in the time of a rectified flow, t = 1 / (1 + sigma), on its state z = t x (`stillhouse/diffusion/flow.py`).

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


def _latent_seeds(x: Tensor) -> Tensor:
    """A seed per sample, read from the bits of its first two latent values (B,), int64."""
    low, high = x.flatten(1)[:, 0], x.flatten(1)[:, -1]
    bits = torch.stack([low, high]).float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return bits[0] | bits[1] << 32


class Solver(NamedTuple):
    solve: Callable[..., Iterator[Tensor]]
    evaluations: int  # of the network per step; the last step, to sigma = 0, takes one


SOLVERS = {
    "euler": Solver(euler, 1),
    "heun": Solver(heun, 2),
    "stochastic_heun": Solver(stochastic_heun, 2),
    "flow_heun": Solver(flow_heun, 2),
    "dpm_solver_pp": Solver(dpm_solver_pp, 1),
}


def check_solver(owner: str, solver: str, options: Mapping[str, Any]) -> None:
    """Errors: ValueError, naming `owner`'s options, for an unknown solver, or options that it lacks or can't take."""
    if solver not in SOLVERS:
        raise ValueError(f"{owner}.solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    try:
        SOLVERS[solver].solve(None, None, None, None, **options)  # checks the options and evaluates nothing
    except (TypeError, ValueError) as error:
        text = f"{owner}.solver_options={dict(options)} do not fit the solver {solver!r}: {error} (null: no options)"
        raise ValueError(text) from None


def evaluations(solver: str, steps: int) -> int:
    """Network evaluations (NFE) of `steps` steps that end at sigma = 0."""
    return SOLVERS[solver].evaluations * (steps - 1) + 1

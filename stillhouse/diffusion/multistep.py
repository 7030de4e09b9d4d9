"""DPM-Solver++ (Lu et al., arXiv 2211.01095): a solver that remembers its last estimates instead of evaluating again.

With a = 1 the paper's clock is lambda = -ln(sigma), and the probability-flow ODE in it is dx/dlambda = D - x. Over a step
of length h from sigma to sigma' it is solved by

    x(h) = exp(-h) x + int_0^h exp(u - h) D(u) du,    exp(-h) = sigma' / sigma,

where D is replaced by the polynomial through the estimates at the last levels: a constant (this is DDIM), a line, a parabola.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import DenoiserFunction

# How much of the parabola's quadratic term a step of order 3 takes. The integral above says 1; the authors' code, and SFD's
# and diffusers' after it, take half, and that is the solver whose results are published. It costs the third order in
# the limit (errors fall with h^2, at about a quarter of order 2's) but not accuracy at 8 to 20 steps.
QUADRATIC_SHARE = 0.5


def dpm_solver_pp(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    order: int = 3,
    lower_order_final: bool = True,
    threshold: float | None = None,
) -> Iterator[Tensor]:
    """Solve in several steps of data prediction, one evaluation each; a generator as those in `stillhouse.diffusion.solvers`.

    The history lives in the generator: a few states at a time are the same as all at once.

    Args:
        denoiser, x, sigmas, labels: as of `stillhouse.diffusion.solvers.euler`.
        order: 1 (DDIM), 2 (the paper's algorithm 2) or 3, reached over the first steps, which have less to look back on.
        lower_order_final: whether the last step is of order 1 and the one before of at most 2; steadier with few steps. A
            step to sigma = 0, where lambda diverges, is of order 1 in any case and returns the estimate itself.
        threshold: None, or the share in (0, 1) of `dynamic_threshold`, applied to every estimate (SFD: 0.995).

    Returns:
        The states after each step.

    Raises:
        ValueError: for impossible options, at the call and not at the first state.
    """
    if not isinstance(order, int) or not 1 <= order <= 3:
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if not isinstance(lower_order_final, bool):
        raise ValueError(f"lower_order_final must be true or false, got {lower_order_final!r}")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), as 0.995, or be null for no thresholding; got {threshold!r}")
    return _states(denoiser, x, sigmas, labels, order, lower_order_final, threshold)


def _states(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None,
    order: int,
    lower_order_final: bool,
    threshold: float | None,
) -> Iterator[Tensor]:
    levels = sigmas.tolist()
    history: list[Tensor] = []  # newest first
    for step, (sigma, following) in enumerate(pairwise(levels)):
        estimate = denoiser(x, x.new_full((), sigma), labels)
        if threshold is not None:
            estimate = dynamic_threshold(estimate, threshold)
        history = [estimate, *history][:order]
        used = 1 if following == 0 else len(history)
        if lower_order_final:
            used = min(used, len(levels) - 1 - step)
        past = levels[step + 1 - used : step + 1][::-1]
        x = following / sigma * x
        for weight, estimate in zip(_weights(past, following), history, strict=False):
            x = x + weight * estimate
        yield x


def _weights(past: Sequence[float], following: float) -> list[float]:
    """Compute the factors of the estimates made at the levels `past` (newest first; as many as the order) in a step."""
    constant = 1 - following / past[0]  # int_0^h exp(u - h) du
    if len(past) == 1:
        return [constant]
    h = math.log(past[0] / following)
    gaps = [math.log(older / newer) for newer, older in pairwise(past)]
    if len(past) == 2:  # the paper gives the line's value in the middle of the step to all of it
        slope = constant * h / 2 / gaps[0]
        return [constant + slope, -slope]
    linear = h - constant  # int_0^h exp(u - h) u du
    quadratic = h**2 - 2 * linear  # int_0^h exp(u - h) u^2 du
    # Newton's form: D(u) = D_0 + u D_01 + u (u + gap) D_012 with the divided differences D_01 and D_012.
    bend = (linear * gaps[0] + QUADRATIC_SHARE * quadratic) / sum(gaps)
    newer, older = (linear + bend) / gaps[0], bend / gaps[1]
    return [constant + newer, -newer - older, older]


def dynamic_threshold(estimate: Tensor, share: float) -> Tensor:
    """Clip estimates (B, ...) to [-s, s] and divide by s = max(1, the `share` quantile of |estimate|) of each sample.

    From Imagen (arXiv 2205.11487, section 2.3): values within [-1, 1] are left alone. float32 or float64. Of few pixels
    (64 in a digit) a quantile of 0.995 is nearly the maximum, and one bright pixel dims the whole image.
    """
    bound = torch.quantile(estimate.abs().flatten(1), share, dim=1).clamp(min=1)
    bound = bound.reshape(-1, *[1] * (estimate.dim() - 1))
    return estimate.clamp(-bound, bound) / bound

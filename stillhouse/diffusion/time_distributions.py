"""Distributions of the time t of a flow at which a method compares it with its target, as quantile functions of u in (0, 1).

Each is called with u (B,), float64, and `start`, where the network's time begins. It returns t (B,), float64: in [start, 1), or 0
for the noise itself, which the network reads as it reads `start`. Impossible parameters are refused with a ValueError.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.checks import check_counts


@dataclass(frozen=True)
class Start:
    """The time t = 0 always: one-step distillation."""

    def __call__(self, u: Tensor, start: float) -> Tensor:
        return torch.zeros_like(u)


@dataclass(frozen=True)
class Uniform:
    """The distribution t ~ U[start, 1]: rectified flow's (arXiv 2209.03003)."""

    def __call__(self, u: Tensor, start: float) -> Tensor:
        return start + (1 - start) * u


@dataclass(frozen=True)
class UShaped:
    """The distribution p(t) ~ e^(a t) + e^(a (1 - t)) over [start, 1]: 2-RF++'s, with a = 4 (arXiv 2405.20320, released code).

    With y = t - 1/2 its distribution function is 1/2 + sinh(a y) / (2 sinh(a / 2)).

    Args:
        a: how much of it is near both ends, positive.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        if self.a <= 0:
            raise ValueError(f"the U-shaped distribution needs a positive a, got {self.a!r}")

    def __call__(self, u: Tensor, start: float) -> Tensor:
        share = 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a
        return start + (1 - start) * share


@dataclass(frozen=True)
class Grid:
    """The uniform distribution over the beginnings of `steps` equal steps from start to 1 (arXiv 2209.03003).

    Args:
        steps: k of k-step distillation.
    """

    steps: int

    def __post_init__(self) -> None:
        check_counts(1, **{"method.steps": self.steps})

    def __call__(self, u: Tensor, start: float) -> Tensor:
        step = (u * self.steps).floor()
        return torch.where(step == 0, 0.0, start + (1 - start) * step / self.steps)


@dataclass(frozen=True)
class StartOrLater:
    """The time t = 0 with probability 1 - later, else t ~ U[start, 1]: states on the way as auxiliary inputs.

    Args:
        later: the share of later times, in [0, 1].
    """

    later: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.later <= 1:
            raise ValueError(f"the share of later times must lie in [0, 1], got {self.later!r}")

    def __call__(self, u: Tensor, start: float) -> Tensor:
        at_start = u < 1 - self.later
        share = (u - (1 - self.later)) / self.later if self.later else u
        return torch.where(at_start, 0.0, start + (1 - start) * share)


TimeDistribution = Start | Uniform | UShaped | Grid | StartOrLater

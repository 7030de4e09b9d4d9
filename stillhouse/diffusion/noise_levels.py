"""Distributions of the noise levels at which a method compares denoisers: quantile functions, from u in (0, 1) to sigma."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.checks import check_counts


@dataclass(frozen=True)
class LogNormal:
    """The distribution ln(sigma) ~ N(mean, std^2): EDM's for training (arXiv 2206.00364, table 1), also Diff-Instruct's.

    Args:
        mean: of ln(sigma).
        std: of ln(sigma), positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"a log-normal distribution needs a positive std, got {self.std!r}")

    def __call__(self, u: Tensor) -> Tensor:
        """Turn uniform numbers u (B,), float64 in (0, 1), into noise levels (B,), float32."""
        return (torch.special.ndtri(u) * self.std + self.mean).exp().float()


@dataclass(frozen=True)
class KarrasGrid:
    """The uniform distribution over the entries `first` .. `last` of a grid that is linear in sigma^(1/rho), entry 0 the least.

    DMD2's ImageNet-64 distribution (arXiv 2405.14867, released code): 1000 levels, 20 .. 980 for the generator and all for the
    fake score.

    Args:
        sigma_min: the lowest level.
        sigma_max: the highest level.
        rho: of the grid, positive.
        levels: of the grid.
        first: the lowest entry.
        last: the highest entry.

    Raises:
        ValueError: for impossible numbers.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    levels: int = 1000
    first: int = 20
    last: int = 980

    def __post_init__(self) -> None:
        check_counts(2, levels=self.levels)
        KarrasUniform(self.sigma_min, self.sigma_max, self.rho)  # checks them
        if not 0 <= self.first <= self.last < self.levels:
            raise ValueError(f"need 0 <= first <= last < levels={self.levels}, got {self.first!r} and {self.last!r}")

    def __call__(self, u: Tensor) -> Tensor:
        """Turn uniform numbers u (B,), float64 in (0, 1), into noise levels (B,), float32."""
        entry = (self.first + u * (self.last - self.first + 1)).floor()
        return KarrasUniform(self.sigma_min, self.sigma_max, self.rho)(entry / (self.levels - 1))


@dataclass(frozen=True)
class KarrasUniform:
    """The distribution that is uniform in sigma^(1/rho) between two levels: what `KarrasGrid` has in steps.

    With u in [0, 1] for a place between them it also turns times of EDM's schedule (arXiv 2206.00364, equation 5) into levels.

    Args:
        sigma_min: the lowest level, at u = 0.
        sigma_max: the highest level, at u = 1.
        rho: positive.

    Raises:
        ValueError: for impossible numbers.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min!r} and {self.sigma_max!r}")
        if self.rho <= 0:
            raise ValueError(f"rho must be positive, got {self.rho!r}")

    def __call__(self, u: Tensor) -> Tensor:
        """Turn uniform numbers u (B,), float64 in [0, 1], into noise levels (B,), float32."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)).pow(self.rho).float()


class TruncatedStudentT(nn.Module):
    """Student's t distribution of ln(sigma), truncated to [ln(sigma_min), ln(sigma_max)]: TCM's (arXiv 2410.14895).

    With ln(sigma) = mean + scale sqrt(df) sinh(v) the density of v is proportional to cosh(v)^-df, flat for few degrees of
    freedom. Its quantiles are interpolated in a table, which a module moves to the device with all else.

    Args:
        mean: the location.
        scale: positive.
        df: degrees of freedom, positive.
        sigma_min: the lowest level.
        sigma_max: the highest level.

    Raises:
        ValueError: for impossible numbers.
    """

    def __init__(self, mean: float, scale: float, df: float, sigma_min: float, sigma_max: float):
        super().__init__()
        if not (scale > 0 and df > 0):
            raise ValueError(f"Student's t distribution needs a positive scale and df, got {scale!r} and {df!r}")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min!r} and {sigma_max!r}")
        self.mean, self.width = mean, scale * math.sqrt(df)
        self.low, self.high = math.log(sigma_min), math.log(sigma_max)
        ends = [math.asinh((level - mean) / self.width) for level in (self.low, self.high)]
        v = np.linspace(*ends, 1 << 16)
        density = np.exp(-df * (np.logaddexp(v, -v) - math.log(2)))
        cdf = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
        quantiles = np.interp(np.linspace(0, 1, 4097), cdf / cdf[-1], v)
        self.register_buffer("quantiles", torch.from_numpy(quantiles), persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        """Turn uniform numbers u (B,), float64 in (0, 1), into noise levels (B,), float32."""
        place = u * (len(self.quantiles) - 1)
        index = place.long()
        v = torch.lerp(self.quantiles[index], self.quantiles[index + 1], place - index)
        return (self.mean + self.width * v.sinh()).clamp(self.low, self.high).exp().float()


NoiseLevelDistribution = LogNormal | KarrasGrid | KarrasUniform

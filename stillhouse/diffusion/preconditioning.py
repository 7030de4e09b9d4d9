"""Preconditionings, by which a network becomes a denoiser: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

Every process x_t = a_t x0 + s_t e is `x = x0 + sigma e` after division by a_t, with sigma = s_t / a_t. Each class below
states the four coefficients of one family in that coordinate (EDM, arXiv 2206.00364, table 1; the v, x0 and flow rows
follow from the definitions of their targets).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.diffusion.schedules import LOG_SNR_CLIP, ddpm_sigmas


class Coefficients(NamedTuple):
    """The coefficients c_skip, c_out, c_in and c_noise, each of the shape of sigma."""

    skip: Tensor
    out: Tensor
    in_: Tensor
    noise: Tensor


class Preconditioning(nn.Module):
    """Base of preconditionings: coefficients of noise levels of any shape, float32 or float64, in that shape and precision."""

    def forward(self, sigma: Tensor) -> Coefficients:
        """Compute the coefficients at noise levels sigma > 0."""
        raise NotImplementedError

    def scale(self, sigma: Tensor) -> Tensor:
        """Compute a(sigma), where a(sigma) x is the published network's variable."""
        raise NotImplementedError

    def prior_std(self, sigma: Tensor) -> Tensor:
        """Compute the standard deviation of x where sampling starts: unit noise in the published network's variable."""
        return 1 / self.scale(sigma)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Compute 1 / c_out^2, by which the weighted error of the denoiser is the squared error of the network's target.

        That is EDM's lambda(sigma) for EDM, and the eps-, x0-, v- and velocity-MSE for the others.
        """
        return self(sigma).out ** -2

    def one_step(self) -> "Preconditioning":
        """Give the form in which a one-step student reads the network at the highest noise level."""
        return self

    def options(self) -> dict[str, Any]:
        """List the constructor's arguments, by which another one of this class becomes equal to this one."""
        return {}


class EDM(Preconditioning):
    """EDM's preconditioning: unit-variance inputs and targets for data of standard deviation `sigma_data`."""

    def __init__(self, sigma_data: float = 0.5):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def forward(self, sigma: Tensor) -> Coefficients:
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / total.sqrt(),
            in_=total.rsqrt(),
            noise=sigma.log() / 4,
        )

    def scale(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def prior_std(self, sigma: Tensor) -> Tensor:
        return sigma

    def options(self) -> dict[str, Any]:
        return {"sigma_data": self.sigma_data}


class VariancePreserving(Preconditioning):
    """Base for networks whose variable is z = x / sqrt(1 + sigma^2), as in DDPM: a^2 + s^2 = 1."""

    def scale(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2).rsqrt()


class Epsilon(VariancePreserving):
    """Preconditioning of DDPM networks, which predict the noise at integer time indices of a linear beta schedule.

    The time index is interpolated in log sigma, and is exactly integer at the schedule's noise levels.

    Args:
        timesteps: of the schedule.
        beta_start: the first beta.
        beta_end: the last beta.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        super().__init__()
        self.betas = (beta_start, beta_end)
        log_sigmas = ddpm_sigmas(timesteps, beta_start, beta_end).log()
        self.register_buffer("log_sigmas", log_sigmas, persistent=False)

    def index(self, sigma: Tensor) -> Tensor:
        """Find the time index of noise levels in [0, timesteps - 1], real-valued, float64."""
        target = sigma.double().log()
        right = torch.searchsorted(self.log_sigmas, target).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[right - 1], self.log_sigmas[right]
        index = (right - 1 + (target - low) / (high - low)).clamp(0, len(self.log_sigmas) - 1)
        # float32 noise levels miss their index by about 1e-5; published networks have seen only integers.
        return torch.where((index - index.round()).abs() < 1e-3, index.round(), index)

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), -sigma, self.scale(sigma), self.index(sigma).to(sigma.dtype))

    def one_step(self) -> Preconditioning:
        return ResidualEpsilon(len(self.log_sigmas))

    def options(self) -> dict[str, Any]:
        return {"timesteps": len(self.log_sigmas), "beta_start": self.betas[0], "beta_end": self.betas[1]}


class EDM1000(EDM):
    """EDM's with a noise label a thousand times as large, as openai/consistency_models has it."""

    def forward(self, sigma: Tensor) -> Coefficients:
        coefficients = super().forward(sigma)
        return coefficients._replace(noise=1000 * coefficients.noise)


class VP(VariancePreserving):
    """Preconditioning of Score SDE's eps networks on beta(t) = beta_min + beta_d t (arXiv 2011.13456), as EDM reads them.

    Their time input is (timesteps - 1) t (EDM, table 1), not rounded. Sampling starts as EDM's does, at x = sigma e.

    Args:
        beta_d: the slope of beta(t).
        beta_min: beta(0).
        timesteps: M of EDM's table.
    """

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, timesteps: int = 1000):
        super().__init__()
        if not beta_d > 0 or not beta_min > 0 or timesteps < 2:
            raise ValueError(
                f"need beta_d > 0, beta_min > 0 and timesteps >= 2, got {beta_d!r}, {beta_min!r} and {timesteps!r}"
            )
        self.beta_d, self.beta_min, self.timesteps = beta_d, beta_min, timesteps

    def time(self, sigma: Tensor) -> Tensor:
        """Find t in [0, 1] where ln(1 + sigma^2) = beta_d t^2 / 2 + beta_min t."""
        level = (sigma**2).log1p()
        # The root without a difference of nearly equal numbers, which float32 would feel at small noise.
        return 2 * level / ((self.beta_min**2 + 2 * self.beta_d * level).sqrt() + self.beta_min)

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), -sigma, self.scale(sigma), (self.timesteps - 1) * self.time(sigma))

    def prior_std(self, sigma: Tensor) -> Tensor:
        return sigma

    def one_step(self) -> Preconditioning:
        return ResidualEpsilon(self.timesteps)

    def options(self) -> dict[str, Any]:
        return {"beta_d": self.beta_d, "beta_min": self.beta_min, "timesteps": self.timesteps}


class VE(Preconditioning):
    """Preconditioning of Score SDE's networks that see x and predict -e; their noise label is ln(sigma / 2) (EDM, table 1)."""

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log())

    def scale(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def prior_std(self, sigma: Tensor) -> Tensor:
        return sigma


class ResidualEpsilon(VariancePreserving):
    """Preconditioning of Denoising Student's eps networks (arXiv 2101.02388, released code): z - F(z, last index).

    The x0 formula would divide by a = 0.006 at the highest noise level; this form starts near zero instead.
    """

    def __init__(self, timesteps: int = 1000):
        super().__init__()
        self.timesteps = timesteps

    def forward(self, sigma: Tensor) -> Coefficients:
        a = self.scale(sigma)
        return Coefficients(a, -torch.ones_like(sigma), a, torch.full_like(sigma, self.timesteps - 1))

    def options(self) -> dict[str, Any]:
        return {"timesteps": self.timesteps}


class Cosine(VariancePreserving):
    """Base for networks on the continuous cosine schedule, a = cos(pi u / 2); their time input is 1000 u (arXiv 2202.00512)."""

    def time(self, sigma: Tensor) -> Tensor:
        """Compute the time input, with the log-SNR cut to +-20."""
        limit = torch.e ** (LOG_SNR_CLIP / 2)
        return sigma.clamp(1 / limit, limit).atan() * (2000 / torch.pi)


class V(Cosine):
    """Preconditioning of v-prediction, v = a e - s x0: D = a z - s v with z = a x."""

    def forward(self, sigma: Tensor) -> Coefficients:
        a = self.scale(sigma)
        return Coefficients(a**2, -sigma * a, a, self.time(sigma))


class X0(Cosine):
    """Preconditioning of x0-prediction: the network's output is the denoiser."""

    def forward(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), self.scale(sigma), self.time(sigma))


class Velocity(Preconditioning):
    """Preconditioning of rectified flow, X_t = (1 - t) e + t x0 with v = x0 - e (arXiv 2209.03003).

    With sigma = (1 - t) / t; the time input is 999 t.
    """

    def scale(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def forward(self, sigma: Tensor) -> Coefficients:
        t = self.scale(sigma)
        return Coefficients(t, sigma * t, t, 999 * t)


class Consistency(Preconditioning):
    """Preconditioning that reads another one's network as a consistency function: D(x, sigma_min) = x.

    After arXiv 2303.01469, appendix C: c_skip is the other's at sigma - sigma_min, and c_out is multiplied by
    (sigma - sigma_min) / sigma. For `EDM` that is the published form; above sigma_min, where there is hardly a difference, a
    teacher's network keeps its meaning.

    Args:
        of: the other one, or its name and options, as {"name": "EDM", "sigma_data": 0.5}.
        sigma_min: the noise level of clean images.

    Raises:
        ValueError: for one that passes nothing of x on to its estimate at small noise.
    """

    def __init__(self, of: Preconditioning | dict[str, Any], sigma_min: float = 0.002):
        super().__init__()
        self.of = from_description(of) if isinstance(of, dict) else of
        if not sigma_min > 0:
            raise ValueError(f"sigma_min must be positive, got {sigma_min}")
        if self.of(torch.tensor([1e-4])).skip.item() < 0.99:
            raise ValueError(
                f"{type(self.of).__name__} can't be read as a consistency function: at small noise D(x) is not x"
            )
        self.sigma_min = sigma_min

    def forward(self, sigma: Tensor) -> Coefficients:
        level = (sigma - self.sigma_min).clamp_min(0)
        coefficients = self.of(sigma)
        return coefficients._replace(skip=self.of(level).skip, out=coefficients.out * (level / sigma))

    def scale(self, sigma: Tensor) -> Tensor:
        return self.of.scale(sigma)

    def prior_std(self, sigma: Tensor) -> Tensor:
        return self.of.prior_std(sigma)

    def options(self) -> dict[str, Any]:
        return {"of": description_of(self.of), "sigma_min": self.sigma_min}


_ALL = (EDM, EDM1000, VP, VE, Epsilon, ResidualEpsilon, V, X0, Velocity, Consistency)
PRECONDITIONINGS = {cls.__name__: cls for cls in _ALL}


def description_of(preconditioning: Preconditioning) -> dict[str, Any]:
    """Describe a preconditioning by its class's name and its options, as JSON can say them; see `from_description`."""
    return {"name": type(preconditioning).__name__, **preconditioning.options()}


def from_description(description: dict[str, Any]) -> Preconditioning:
    """Make the preconditioning that `description_of` describes."""
    options = dict(description)
    return PRECONDITIONINGS[options.pop("name")](**options)

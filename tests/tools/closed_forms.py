"""Denoisers that are known exactly: the truth that solvers, preconditionings and methods are tested against."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from datamodules.components.batch_loader import BatchLoader, endless_loader
from stillhouse.diffusion import preconditioning as P
from stillhouse.diffusion.schedules import ddpm_sigmas, karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.branching import BranchedConv2d
from stillhouse.networks.layers import zeroed

MEANS = torch.tensor([[-0.6, 0.3], [0.5, 0.5], [0.1, -0.7]], dtype=torch.float64)


class Mixture:
    """x0 ~ sum_k N(mean_k, std^2 I) / K over pixels.

    Its denoiser is D(x, sigma) = sum_k r_k (std^2 x + sigma^2 mean_k) / (std^2 + sigma^2).
    """

    def __init__(self, means: Tensor = MEANS, std: float = 0.2):
        self.means, self.std = means, std

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = x.flatten(1).double()
        sigma = sigma.double().expand(len(x))[:, None]
        variance = self.std**2 + sigma**2
        means = self.means.to(flat)
        log_r = -(flat[:, None] - means).square().sum(-1) / (2 * variance)
        if labels is not None:
            log_r = log_r.masked_fill(labels[:, None] != torch.arange(len(means), device=x.device), -torch.inf)
        mean = log_r.softmax(1) @ means
        return ((self.std**2 * flat + sigma**2 * mean) / variance).reshape(x.shape).to(x.dtype)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        component = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[component] + self.std * noise)[:, :, None, None]


def exact_solution(x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
    """The mixture's probability-flow ODE from x, float64 on the CPU, to 1e-11."""
    mixture = Mixture()

    def slope(sigma, flat):
        state = torch.tensor(flat).reshape(x.shape)
        return ((state - mixture(state, torch.tensor(sigma))) / sigma).numpy().ravel()

    solution = solve_ivp(slope, (sigma_from, sigma_to), x.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.tensor(solution.y[:, -1]).reshape(x.shape)


class ExactNetwork(nn.Module):
    """The mixture's exact prediction in one family's own variables: what a perfectly trained network would output.

    Written from the definitions of eps, v, x0 and velocity, not from the coefficients under test.
    """

    def __init__(self, family: str, mixture: Mixture):
        super().__init__()
        self.family, self.mixture = family, mixture
        self.in_channels, self.out_channels, self.resolution = 2, 2, 1
        self.num_classes = 0

    def process(self, noise_labels: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of x_t = a x0 + s e for this family's time input."""
        t = noise_labels.double()
        if self.family == "epsilon":
            sigma = ddpm_sigmas()[t.long()]
            return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        if self.family in ("v", "x0"):
            return torch.cos(torch.pi * t / 2000), torch.sin(torch.pi * t / 2000)
        if self.family == "velocity":
            return t / 999, 1 - t / 999
        if self.family == "vp":  # beta(t) = 0.1 + 19.9 t
            signal = torch.exp(-(19.9 * (t / 999) ** 2 / 2 + 0.1 * t / 999))
            return signal.sqrt(), (1 - signal).sqrt()
        if self.family == "ve":
            return torch.ones_like(t), 2 * torch.exp(t)
        sigma = torch.exp(4 * t)  # EDM: network input is divided by the total standard deviation
        total = (sigma**2 + 0.25).sqrt()
        return 1 / total, sigma / total

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None, augment_labels=None) -> Tensor:
        a, s = (value[:, None, None, None] for value in self.process(noise_labels))
        z = z.double()
        x0 = self.mixture(z / a, (s / a).flatten(), class_labels)
        e = (z - a * x0) / s
        target = {"epsilon": e, "vp": e, "ve": -e, "v": a * e - s * x0, "x0": x0, "velocity": x0 - e}.get(self.family)
        if target is None:  # EDM's effective target, equation 8 of the paper: (D - c_skip x) / c_out
            sigma = s / a
            target = (x0 - 0.25 / (sigma**2 + 0.25) * z / a) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())
        return target.float()


class ExactMeanVelocity(nn.Module):
    """The mean velocity u(z, t, r) of the flow of N(mean, std^2 I), for `Velocity`: what a perfect network of two times says.

    With x = z / t at noise level sigma, (x - mean) / sqrt(std^2 + sigma^2) stays as it is along a path.
    """

    two_times = True

    def __init__(self, gaussian: Mixture):
        super().__init__()
        self.mean, self.std = gaussian.means[0].view(-1, 1, 1), gaussian.std
        self.in_channels, self.out_channels, self.resolution = 2, 2, 1
        self.num_classes = 0

    def moved(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X_r of X_t = z, for times (B, 1, 1, 1)."""
        spread = [(self.std**2 * time**2 + (1 - time) ** 2).sqrt() for time in (t, r)]
        return r * self.mean + spread[1] / spread[0] * (z - t * self.mean)

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None, augment_labels=None, span=None) -> Tensor:
        t, span = noise_labels.double()[:, None, None, None] / 999, span.double()[:, None, None, None]
        z = z.double()
        # The derivative of `moved` by r at r = t.
        slope = self.mean + (self.std**2 * t - (1 - t)) / (self.std**2 * t**2 + (1 - t) ** 2) * (z - t * self.mean)
        still = span < 1e-6
        mean = (self.moved(z, t, t + span) - z) / torch.where(still, 1.0, span)
        return torch.where(still, slope, mean).float()


FAMILIES = {"edm": P.EDM, "epsilon": P.Epsilon, "vp": P.VP, "ve": P.VE, "v": P.V, "x0": P.X0, "velocity": P.Velocity}


class Corrected(nn.Module):
    """An exact network plus a trainable correction that starts at zero: teachers stay exact, their copies can learn."""

    def __init__(self, exact: nn.Module, size: int = 2, width: int = 64):
        super().__init__()
        self.exact = exact
        self.in_channels, self.out_channels, self.resolution = 2, 2, 1
        self.num_classes = 0
        self.layers = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None, augment_labels=None) -> Tensor:
        correction = self.last(self.layers(z.flatten(1))).reshape(z.shape)
        return self.exact(z, noise_labels, class_labels) + correction


class CorrectedByLevel(Corrected):
    """The same with a correction that knows the noise level, as a score in training must."""

    def __init__(self, exact: nn.Module, width: int = 64):
        super().__init__(exact, size=3, width=width)
        self.last = nn.Linear(width, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None, augment_labels=None) -> Tensor:
        seen = torch.cat([z.flatten(1), noise_labels[:, None]], 1)
        return self.exact(z, noise_labels, class_labels) + self.last(self.layers(seen)).reshape(z.shape)


class BranchingCorrected(CorrectedByLevel):
    """The same with a correction that can branch (`networks.branching`): each group corrects the exact output its own way."""

    def __init__(self, exact: nn.Module, width: int = 64):
        super().__init__(exact, width)
        self.last = zeroed(BranchedConv2d(width, 2, 1))

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None, augment_labels=None) -> Tensor:
        seen = torch.cat([z.flatten(1), noise_labels[:, None]], 1)
        corrections = self.last(self.layers(seen)[:, :, None, None])
        exact = self.exact(z, noise_labels, class_labels)
        return exact.repeat(1, corrections.shape[1] // exact.shape[1], 1, 1) + corrections


def exact_teacher(mixture: Mixture | None = None, steps: int = 16, network: type = Corrected, **options) -> Teacher:
    """An EDM teacher of the mixture with images of shape (2, 1, 1)."""
    return Teacher(
        "mixture", network(ExactNetwork("edm", mixture or Mixture())), P.EDM(), karras, steps=steps, **options
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two sets of points (n, d); zero for equal distributions."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = [torch.pdist(points).mean() for points in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()


class MixtureData(pl.LightningDataModule):
    """Batches {"image", "position"} of the mixture, each a function of its place in the run alone, as of a real data set."""

    num_classes = 0
    verify = False

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> BatchLoader:
        return endless_loader(self.trainer, self.fetch, self.batch_size, self.batch_size, seed=0)

    @staticmethod
    def fetch(position: int, items: Sequence[int]) -> dict[str, Tensor]:
        images = Mixture().sample(len(items), torch.Generator().manual_seed(position))
        return {"image": images.float(), "position": torch.arange(position, position + len(items))}


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule | None,
    *callbacks: pl.Callback,
    resume: str | Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train a method for its whole budget with nothing around it but `callbacks`; resume: a checkpoint; options: Trainer's, and
    gradient_clip_val as in conf/trainer."""
    module.gradient_clip = options.pop("gradient_clip_val", module.gradient_clip)
    bare = {
        "max_steps": module.total_steps,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), accelerator="cpu", max_epochs=-1, **(bare | options))
    trainer.fit(module, module.training_data(data), ckpt_path=resume)
    return trainer


def resumed_repeats(
    fresh: Callable[[], pl.LightningModule], data: pl.LightningDataModule | None, folder: Path
) -> pl.LightningModule:
    """Train a method whole, and another one from the third step of one that was stopped there; the first one.

    Its state is found again in the resumed one, to the last bit, and its student is not what was there at the stop.
    """
    whole, stopped, resumed = fresh(), fresh(), fresh()
    fit(whole, data)
    fit(stopped, data, max_steps=3).save_checkpoint(folder / "stopped.ckpt")
    fit(resumed, data, resume=folder / "stopped.ckpt")
    again, before = resumed.state_dict(), stopped.student.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in whole.student.state_dict().items())
    return whole


def column(values: Tensor) -> Tensor:
    """Numbers (B,) in the shape that is multiplied with images, (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)

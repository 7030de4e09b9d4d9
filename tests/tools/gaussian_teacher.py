"""A stand-in teacher with a closed form: class y is N(mean_y, SPREAD^2) in every pixel, sampled by Euler steps."""

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

SPREAD = 0.3


class GaussianTeacher:
    solver_name = "euler"

    def __init__(self, name="gauss", num_classes=4, resolution=4, channels=2, steps=5, sigma_max=20.0, delay=0.0):
        self.name, self.num_classes, self.resolution, self.channels = name, num_classes, resolution, channels
        self.steps, self.sigma_max, self.delay = steps, sigma_max, delay
        self.hash = "ab" * 32
        self.shift = 0.0

    def to(self, device: torch.device | str) -> "GaussianTeacher":
        return self

    def sigmas(self, steps: int | None = None, through: tuple[float, ...] = ()) -> Tensor:
        steps = steps or self.steps
        levels = torch.linspace(self.sigma_max ** (1 / 7), 0.01 ** (1 / 7), steps, dtype=torch.float64) ** 7
        return torch.cat([levels, levels.new_zeros(1)])

    def trajectory(
        self, noise: Tensor, labels: Tensor | None = None, steps: int | None = None, through: tuple[float, ...] = ()
    ) -> Iterator[Tensor]:
        mean = torch.zeros(len(noise)) if labels is None else labels / self.num_classes - 0.4
        mean = mean.double()[:, None, None, None] + self.shift
        sigmas = self.sigmas(steps).tolist()
        x = noise.double() * sigmas[0]
        for sigma, following in itertools.pairwise(sigmas):
            time.sleep(self.delay)
            denoised = (SPREAD**2 * x + sigma**2 * mean) / (SPREAD**2 + sigma**2)
            x = x + (following - sigma) * (x - denoised) / sigma
            yield x

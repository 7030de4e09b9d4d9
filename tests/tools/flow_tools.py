"""Flows of points that the flow methods are tested on: exactly known teachers, and networks that learn from nothing."""

import torch
from torch import Tensor, nn

from closed_forms import ExactNetwork, Mixture
from stillhouse.diffusion.preconditioning import Velocity
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.branching import BranchedConv2d
from stillhouse.networks.layers import zeroed


class Nothing(nn.Module):
    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None) -> Tensor:
        return torch.zeros_like(z)


class Learner(nn.Module):
    """`base` plus a trainable correction of point and time, zero at first, whose output can branch."""

    def __init__(self, base: nn.Module, width: int = 64):
        super().__init__()
        self.base = base
        self.in_channels, self.out_channels, self.resolution, self.num_classes = 2, 2, 1, 0
        layers = (
            nn.Linear(7, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )
        self.layers = nn.Sequential(*layers)
        self.last = zeroed(BranchedConv2d(width, 2, 1))

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None) -> Tensor:
        t = noise_labels[:, None] / 999
        waves = [f(k * torch.pi * t) for k in (0.5, 1) for f in (torch.sin, torch.cos)]
        correction = self.last(self.layers(torch.cat([z.flatten(1), t, *waves], 1))[:, :, None, None])
        base = self.base(z, noise_labels, class_labels)
        return base.repeat(1, correction.shape[1] // base.shape[1], 1, 1) + correction


def mixture_flow(
    means: Tensor | None = None, name: str = "mixture", steps: int = 16, base: nn.Module | None = None
) -> Teacher:
    """The exact rectified flow of a mixture of points; with `base`, one that has to learn."""
    torch.manual_seed(0)  # the trainable part is the same in every copy
    mixture = Mixture() if means is None else Mixture(means)
    network = Learner(base or ExactNetwork("velocity", mixture))
    return Teacher(name, network, Velocity(), flow_uniform, solver="flow_heun", steps=steps)


COMMON = {"batch_size": 128, "seed": 0, "kimg": 40, "lr": 3e-3, "warmup_kimg": 1, "betas": (0.9, 0.99)}

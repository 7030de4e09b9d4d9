"""The random numbers that generated training samples are made of."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.random_numbers import TrainingStream, position_noise, position_uniforms
from stillhouse.diffusion.sampling import Sampling


class TrainingNoise:
    """Of the samples at `positions` (B,), int64, of a run's sequence: each a function of (seed, its position) alone.

    shape: (C, H, W) of an image. What each turn needs comes from two calls: a small one takes as long as a large one.
    """

    def __init__(self, seed: int, positions: Tensor, shape: Sequence[int]):
        self.seed, self.positions, self.shape = seed, positions, tuple(shape)

    @cached_property
    def _uniforms(self) -> tuple[Tensor, ...]:
        return position_uniforms(self.seed, self.positions, TrainingStream.UNIFORMS)

    @cached_property
    def _normals(self) -> tuple[Tensor, ...]:
        return position_noise(self.seed, self.positions, (2, *self.shape), TrainingStream.NORMALS).unbind(1)

    @property
    def latents(self) -> Tensor:
        """z (B, C, H, W), float32, unit normal as all noise here."""
        return self._normals[0]

    @property
    def noise(self) -> Tensor:
        return self._normals[1]

    @cached_property
    def gan_noise(self) -> Tensor:
        return position_noise(self.seed, self.positions, self.shape, TrainingStream.GAN_NOISE)

    @cached_property
    def real_noise(self) -> Tensor:
        return position_noise(self.seed, self.positions, self.shape, TrainingStream.GAN_REAL_NOISE)

    def labels(self, num_classes: int) -> Tensor | None:
        """Uniform labels (B,), int64; None where there are no classes."""
        return (self._uniforms[0] * num_classes).long() if num_classes else None

    def sigma(self, distribution: NoiseLevelDistribution) -> Tensor:
        """Noise levels (B,), float32."""
        return distribution(self._uniforms[1])

    def indices(self, count: int) -> Tensor:
        """Uniform whole numbers in [0, count), (B,), int64, for choosing a noise level from a list: the draw of `sigma`."""
        return (self._uniforms[1] * count).long()

    def gan_sigma(self, distribution: NoiseLevelDistribution) -> Tensor:
        return distribution(self._uniforms[2])


def one_step(denoiser: Denoiser, noise: Tensor, sigma_init: float, labels: Tensor | None) -> Tensor:
    """The generator G(z) = D(sigma_init z, sigma_init), (B, C, H, W) of unit normal noise of that shape."""
    sigma = noise.new_full((), sigma_init)
    return denoiser(noise * denoiser.preconditioning.prior_std(sigma), sigma, labels)


def one_step_sampling(denoiser: Denoiser, sigma_init: float) -> Sampling:
    """`one_step` in numbers."""
    scale = denoiser.preconditioning.prior_std(torch.tensor(sigma_init)).item()
    return Sampling((sigma_init, 0.0), scale, double=False)

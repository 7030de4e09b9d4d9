"""The random numbers of training samples."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.random_numbers import TrainingStream, position_noise, position_uniforms


class TrainingNoise:
    """Random numbers of training samples, each a function of (seed, its position) alone.

    Those that most updates need come from two calls: a small one takes as long as a large one.

    Args:
        seed: of the run.
        positions: places in the run's sequence of training samples, (B,), int64.
        shape: (C, H, W) of an image.
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
        """A generator's input z (B, C, H, W), float32, unit normal as all noise here."""
        return self._normals[0]

    @property
    def noise(self) -> Tensor:
        """Noise on the images that are compared, (B, C, H, W)."""
        return self._normals[1]

    @cached_property
    def gan_noise(self) -> Tensor:
        """Noise on generated images in front of a discriminator, (B, C, H, W)."""
        return position_noise(self.seed, self.positions, self.shape, TrainingStream.GAN_NOISE)

    @cached_property
    def real_noise(self) -> Tensor:
        """Noise on real images in front of a discriminator, (B, C, H, W)."""
        return position_noise(self.seed, self.positions, self.shape, TrainingStream.GAN_REAL_NOISE)

    def labels(self, num_classes: int) -> Tensor | None:
        """Choose uniform labels (B,), int64; None where there are no classes."""
        return (self._uniforms[0] * num_classes).long() if num_classes else None

    def sigma(self, distribution: NoiseLevelDistribution) -> Tensor:
        """Choose noise levels (B,), float32, of a distribution."""
        return distribution(self._uniforms[1])

    def indices(self, count: int) -> Tensor:
        """Choose uniform whole numbers in [0, count), (B,), int64, such as places in a list of noise levels; replaces `sigma`."""
        return (self._uniforms[1] * count).long()

    @property
    def place(self) -> Tensor:
        """The uniform numbers (B,), float64 in (0, 1), of which `sigma` makes noise levels."""
        return self._uniforms[1]

    @property
    def place_in_step(self) -> Tensor:
        """Uniform numbers (B,), float64 in (0, 1), such as of how far into a step a level lies; they replace `step`."""
        return self._uniforms[3]

    def step(self, count: int) -> Tensor:
        """Choose a step of a sample of `count` steps, (B,), int64 in [0, count)."""
        return (self._uniforms[3] * count).long()

    def gan_sigma(self, distribution: NoiseLevelDistribution) -> Tensor:
        """Choose noise levels (B,), float32, of images in front of a discriminator."""
        return distribution(self._uniforms[2])

"""The random numbers that generated training samples are made of, by what they are for."""

from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.noise_levels import NoiseLevels
from diffusion.seeds import position_noise, position_uniform


class Use(IntEnum):
    LATENT = 0
    LABEL = 1
    SIGMA = 2
    NOISE = 3
    GAN_SIGMA = 4
    GAN_NOISE = 5
    REAL_NOISE = 6


class Draws:
    """Of the samples at `positions` (B,), int64, of a run's sequence: each a function of (seed, position, use) alone."""

    def __init__(self, seed: int, positions: Tensor):
        self.seed, self.positions = seed, positions

    def normal(self, use: Use, shape: Sequence[int]) -> Tensor:
        """(B, *shape), float32."""
        return position_noise(self.seed, self.positions, shape, use)

    def sigma(self, law: NoiseLevels, use: Use = Use.SIGMA) -> Tensor:
        """Noise levels (B,), float32."""
        return law(position_uniform(self.seed, self.positions, use))

    def latents(self, network: nn.Module) -> Tensor:
        """z (B, C, H, W) for a network's input."""
        return self.normal(Use.LATENT, (network.in_channels, network.resolution, network.resolution))

    def labels(self, num_classes: int) -> Tensor | None:
        """Uniform labels (B,), int64; None where there are no classes."""
        if not num_classes:
            return None
        return (position_uniform(self.seed, self.positions, Use.LABEL) * num_classes).long()

    def noised(self, images: Tensor, law: NoiseLevels) -> tuple[Tensor, Tensor]:
        """Noise levels sigma (B,), and images (B, C, H, W) + sigma e."""
        sigma = self.sigma(law)
        return sigma, images + sigma.view(-1, 1, 1, 1) * self.normal(Use.NOISE, images.shape[1:])


def one_step(denoiser: Denoiser, noise: Tensor, sigma_init: float, labels: Tensor | None) -> Tensor:
    """The generator G(z) = D(sigma_init z, sigma_init), (B, C, H, W) of unit normal noise of that shape."""
    sigma = noise.new_full((), sigma_init)
    return denoiser(noise * denoiser.preconditioning.prior_std(sigma), sigma, labels)

"""DMD2's GAN on diffused images (arXiv 2405.14867, released ImageNet-64 code), an addition to score distillation."""

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks import Discriminator
from stillhouse.networks.network import weights_frozen


class GANOptions(TypedDict):
    """The options `method.gan`; see `DiffusedGAN`."""

    generator: float
    fake: float
    sigmas: NoiseLevelDistribution


class DiffusedGAN(nn.Module):
    """A classifier of noised real and generated images, on the encoder of the fake score, which it trains along.

    Args:
        unet: The fake score's network.
        generator: Weight of the generator's loss, on the scale of the loss that it is added to.
        fake: Weight of the classifier's loss, likewise.
        sigmas: Distribution of the noise level.

    Raises:
        ValueError: For weights that are not positive.
    """

    def __init__(self, unet: nn.Module, *, generator: float, fake: float, sigmas: NoiseLevelDistribution):
        super().__init__()
        for option, value in (("generator", generator), ("fake", fake)):
            if not value > 0:
                raise ValueError(
                    f"method.gan.{option} must be a positive number, got {value!r}; method.gan=null: no GAN"
                )
        self.generator, self.fake, self.sigmas = generator, fake, sigmas
        self.discriminator = Discriminator(unet)

    def logits(self, score: Denoiser, images: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Logits (B, 1) of images (B, C, H, W) with noise of the levels sigma (B,)."""
        return self.discriminator(score.encode(noised(images, sigma, noise), sigma, labels))

    def image_gradient(
        self, score: Denoiser, images: Tensor, random: TrainingNoise, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted d softplus(-logit) / d images, (B, C, H, W), and the loss: none of it reaches score or classifier."""
        with weights_frozen(score, self.discriminator), torch.enable_grad():
            leaf = images.detach().requires_grad_()
            logits = self.logits(score, leaf, random.gan_sigma(self.sigmas), random.gan_noise, labels)
            loss = F.softplus(-logits).sum()
            gradient = torch.autograd.grad(loss, leaf)[0]
        return self.generator * gradient, loss.detach() / len(images)

    def classification(
        self,
        score: Denoiser,
        images: Tensor,
        labels: Tensor | None,
        real: Tensor,
        real_labels: Tensor | None,
        random: TrainingNoise,
    ) -> Tensor:
        """softplus(logit of generated) + softplus(-logit of real images), a mean over the batch; not weighted."""
        sigma = random.gan_sigma(self.sigmas)
        generated = self.logits(score, images, sigma, random.gan_noise, labels)
        found_real = self.logits(score, real, sigma, random.real_noise, real_labels)
        return (F.softplus(generated) + F.softplus(-found_real)).mean()

"""DMD2's GAN on diffused images (arXiv 2405.14867, released ImageNet-64 code), an addition to score distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.denoiser import Denoiser
from diffusion.draws import Draws, Use
from diffusion.noise_levels import NoiseLevels
from networks import Discriminator


class DiffusedGAN(nn.Module):
    """A classifier of noised real and generated images, on the encoder of the fake score, which it trains along.

    unet: the fake score's network. generator, fake: weights of the two losses, on the scale of those they are added to.
    sigmas: the law of the noise level.
    """

    def __init__(self, unet: nn.Module, *, generator: float, fake: float, sigmas: NoiseLevels):
        super().__init__()
        for option, value in (("generator", generator), ("fake", fake)):
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"method.gan.{option} must be a positive number, got {value!r}; method.gan=null: no GAN"
                )
        self.generator, self.fake, self.sigmas = generator, fake, sigmas
        self.discriminator = Discriminator(unet)

    def realism(self, score: Denoiser, images: Tensor, draws: Draws, labels: Tensor | None, use: Use) -> Tensor:
        """Logits (B, 1) of images (B, C, H, W), each at a noise level of its own."""
        sigma = draws.sigma(self.sigmas, Use.GAN_SIGMA)
        noised = images + sigma.view(-1, 1, 1, 1) * draws.normal(use, images.shape[1:])
        return self.discriminator(score.encode(noised, sigma, labels))

    def image_gradient(
        self, score: Denoiser, images: Tensor, draws: Draws, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted d softplus(-logit) / d images, (B, C, H, W), and the loss: none of it reaches score or classifier."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            loss = F.softplus(-self.realism(score, leaf, draws, labels, Use.GAN_NOISE)).sum()
            gradient = torch.autograd.grad(loss, leaf)[0]
        return self.generator * gradient, loss.detach() / len(images)

    def classification(
        self,
        score: Denoiser,
        images: Tensor,
        labels: Tensor | None,
        real: Tensor,
        real_labels: Tensor | None,
        draws: Draws,
    ) -> Tensor:
        """softplus(logit of generated) + softplus(-logit of real images), a mean over the batch; not weighted."""
        generated = self.realism(score, images, draws, labels, Use.GAN_NOISE)
        return (
            F.softplus(generated) + F.softplus(-self.realism(score, real, draws, real_labels, Use.REAL_NOISE))
        ).mean()

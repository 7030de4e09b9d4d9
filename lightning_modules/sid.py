"""SiD: score identity distillation (Zhou et al., arXiv 2404.04057)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.components.optimisation import Batch
from lightning_modules.diff_instruct import DiffInstruct, surrogate
from stillhouse.diffusion.losses import noised, score_identity_loss
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks.network import weights_frozen

_OTHERS = ("weighting", "two_sided", "gan")


class SiD(DiffInstruct):
    """A one-step generator y = G(z), pulled to the teacher by the identities that both scores fulfil where they are exact:

        E_{z, sigma, e}  < T(x) - F(x), T(x) - y - alpha (T(x) - F(x)) > / w,   x = y + sigma e,

    with the teacher's estimate T, the fake score's F and w = sg mean |y - T(x)| over pixels. Unlike Diff-Instruct's gradient this
    one goes through both networks, into the images; neither learns by it. Where F is exact the expectation without w is
    (1 - alpha) E |T - F|^2: that it falls below zero for alpha > 1 is no error.

    All else is Diff-Instruct's: the fake score's loss, updates in turn, random numbers, the sampler.

    Args:
        teacher: As of `DiffInstruct`.
        alpha: 1.2 in the paper; at 1/2 the loss is (|T - y|^2 - |F - y|^2) / 2w.
        checkpointing: Whether both scores are evaluated again for the backward pass instead of keeping what it needs: a generator
            update then holds the activations of one network at a time, for two evaluations more.
        options: As of `DiffInstruct` but `weighting`, `two_sided` and `gan`, which its own loss replaces.

    Raises:
        ValueError: For options out of range, or one of those three.
    """

    def __init__(self, teacher: Teacher, *, alpha: float = 1.2, checkpointing: bool = False, **options: Any):
        if others := [name for name in _OTHERS if name in options]:
            raise ValueError(f"method.{others[0]} is no option of SiD, whose loss has its own form: leave it out")
        super().__init__(teacher, **options)
        if not alpha >= 0:
            raise ValueError(f"method.alpha must not be negative, got {alpha!r}")
        self.alpha, self.checkpointing = alpha, checkpointing

    def loss_scale_conflict(self) -> str | None:
        return "would lose the gradient that SiD takes of its images"

    @property
    def evaluations(self) -> dict[str, float]:
        counts = super().evaluations
        if self.checkpointing:
            again = 1 / len(self.update_cycle)
            counts |= {
                "fake score": counts["fake score"] + again,
                "teacher": counts["teacher"] + again * self.target_evaluations,
            }
        return counts

    def generator_loss(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        images = self.generate(batch, noise, labels)
        sigma = noise.sigma(self.generator_sigmas)
        with weights_frozen(self.fake_score), torch.enable_grad():
            leaf = images.detach().requires_grad_()
            x = noised(leaf, sigma, noise.noise)
            losses, fake, target = self.image_losses(leaf, x, sigma, labels)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        self.log_generator(images, gradient, fake, target, sigma)
        return surrogate(images, gradient)

    def image_losses(
        self, images: Tensor, x: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The generator's loss of each image (B,), with the fake score's and the target's estimates of the noised x."""
        fake = self.evaluate(self.fake_score, x, sigma, labels)
        target = self.evaluate(self.target.denoiser, x, sigma, labels)
        losses = score_identity_loss(images, fake, target, self.alpha)
        self.log_mean("loss/score_identity", losses.detach().mean())
        return losses, fake, target

    def evaluate(self, function: Callable[..., Any], x: Tensor, sigma: Tensor, labels: Tensor | None) -> Any:
        """What a denoiser, or a method of one, gives for (x, sigma, labels)."""
        if self.checkpointing:
            return checkpoint(function, x, sigma, labels, use_reentrant=False)
        return function(x, sigma, labels)

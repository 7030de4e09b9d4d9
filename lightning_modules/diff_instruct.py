"""Diff-Instruct: distil by the difference of two scores (Luo et al., arXiv 2305.18455), with DMD2's options."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from datamodules import DataFree
from lightning_modules.components.backtracking import Backtracking
from lightning_modules.components.diffused_gan import DiffusedGAN, GANOptions
from lightning_modules.components.method import check_nfe
from lightning_modules.components.optimisation import Batch
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.losses import SCORE_WEIGHTINGS, noised, score_gradient, weighted_square
from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.sampling import Sampling, one_step, one_step_sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise


class DiffInstruct(Backtracking):
    """A one-step generator G(z) = D_student(sigma_init z, sigma_init), pulled to the teacher's distribution by

        E_{z, sigma, e}  w(sigma) [s_fake(x_sigma) - s_target(x_sigma)] dG(z),   x_sigma = G(z) + sigma e,

    the gradient of the integral KL, where the fake score is trained beside it by denoising score matching on G's samples.
    A training step is one update on one batch of generated images: `fake_updates` of the fake score, then one of the
    generator. With `two_sided` every step is both, from one batch, one noise and one evaluation of each network.

    Labels, latents and noise of a training sample depend on (seed, its position) alone: two processes do what one does.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        sigma_init: float,
        generator_sigmas: NoiseLevelDistribution,
        fake_sigmas: NoiseLevelDistribution,
        weighting: str = "edm",
        fake_updates: int = 1,
        fake_lr_factor: float = 1.0,
        labels: str = "uniform",
        two_sided: bool = False,
        clip: float | None = None,
        gan: GANOptions | None = None,
        **options: Any,
    ):
        """Args beside those of `Backtracking` (all but `nodes` are of use with it alone) and `Method`.

        Args:
            teacher: The network of the target score, with which student and fake score begin.
            sigma_init: The noise level at which the generator is evaluated.
            generator_sigmas: Distribution of sigma in the generator's loss.
            fake_sigmas: Distribution of sigma in the fake score's loss.
            weighting: w, see `score_gradient`. With "dmd" the losses are means over pixels, with "edm" sums, as in the
                released codes.
            fake_updates: Updates of the fake score before each one of the generator.
            fake_lr_factor: The fake score's learning rate over `lr`.
            labels: "uniform", or "data": those of real images.
            two_sided: Both updates in every step.
            clip: Largest norm of a network's gradient; None: no limit.
            gan: None, or the options of `DiffusedGAN`, which needs images.

        Raises:
            ValueError: For options out of range or that exclude each other.
        """
        super().__init__(**options)
        check_counts(**{"method.fake_updates": fake_updates})
        check_choice("method.weighting", weighting, SCORE_WEIGHTINGS)
        check_choice("method.labels", labels, ("uniform", "data"))
        for option, value in (("fake_lr_factor", fake_lr_factor), ("clip", 1.0 if clip is None else clip)):
            if not value > 0:
                raise ValueError(f"method.{option} must be a positive number, got {value!r}")
        if two_sided and (fake_updates != 1 or generator_sigmas != fake_sigmas or gan):
            raise ValueError(
                "method.two_sided shares one noise between both updates: it needs method.fake_updates=1, equal "
                "method.generator_sigmas and method.fake_sigmas, and no method.gan"
            )
        self.teacher = teacher
        self.sigma_init = check_sigma_init(sigma_init, teacher)
        self.student = teacher.student().eval()  # no dropout, as in DMD2: both scores must see the same network
        self.fake_score = teacher.student().eval()
        self.gan = DiffusedGAN(self.fake_score.network, **gan) if gan else None
        self.generator_sigmas, self.fake_sigmas = generator_sigmas, fake_sigmas
        self.weighting, self.labels, self.gradient_clip = weighting, labels, clip
        self.fake_updates, self.fake_lr = fake_updates, self.lr * fake_lr_factor
        self.update_cycle = (
            [("student", "fake_score")] if two_sided else [("fake_score",)] * fake_updates + [("student",)]
        )
        self.set_target(self.sigma_init, self.fake_sigmas)

    def trained_networks(self) -> dict[str, nn.Module]:
        guide = nn.ModuleList([self.fake_score, self.gan]) if self.gan else self.fake_score
        return {"student": self.student, "fake_score": guide}

    def loss_scale_conflict(self) -> str | None:
        return "would lose the gradient that method.gan takes of its images" if self.gan else None

    def learning_rate(self, network: str) -> float:
        return self.fake_lr if network == "fake_score" else self.lr

    @property
    def evaluations(self) -> dict[str, float]:
        share = 1 / len(self.update_cycle)  # of the generator's updates
        counts = {"student": 1.0, "fake score": 1.0, "teacher": share * self.target_evaluations}
        # The encoder alone: of a generated and a real image in a fake-score update, of a generated one in the generator's.
        return counts | ({"fake score's encoder": (2 * self.fake_updates + 1) * share} if self.gan else {})

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        return data if self.gan or (self.labels == "data" and data.num_classes) else DataFree(self.batch_size)

    def sampling(self, nfe: int | None = None) -> Sampling:
        check_nfe(nfe, 1)
        return one_step_sampling(self.student, self.sigma_init)

    # -- the two updates -------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        noise, labels = self.noise_and_labels(batch)
        if self.updating == ("student",):
            return self.generator_loss(batch, noise, labels)
        if self.updating == ("fake_score",):
            return self.fake_score_loss(batch, noise, labels)
        return self.two_sided_loss(batch, noise, labels)

    def noise_and_labels(self, batch: Batch) -> tuple[TrainingNoise, Tensor | None]:
        """The random numbers and the classes (B,) of a batch's training samples."""
        noise = TrainingNoise(self.seed, batch["position"], self.image_shape)
        return noise, noise.labels(self.teacher.num_classes) if self.labels == "uniform" else batch.get("label")

    def generate(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        """The generator's images (B, C, H, W) of training samples, of which `batch` may hold real images."""
        return one_step(self.student, noise.latents, self.sigma_init, labels)

    def generator_loss(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        images = self.generate(batch, noise, labels)
        with torch.no_grad():
            x, sigma = self.compared(batch, images, noise, self.generator_sigmas)
            fake, target = self.fake_score(x, sigma, labels), self.target.denoiser(x, sigma, labels)
            gradient = self.matching_gradient(batch, images, fake, target)
            if self.gan:
                realism_gradient, realism_loss = self.gan.image_gradient(self.fake_score, images, noise, labels)
                self.log_mean("loss/gan_generator", realism_loss)
                gradient += realism_gradient
        self.log_generator(images, gradient, fake, target, sigma)
        return surrogate(images, gradient)

    def compared(
        self, batch: Batch, images: Tensor, noise: TrainingNoise, sigmas: NoiseLevelDistribution
    ) -> tuple[Tensor, Tensor]:
        """The noised forms (B, C, H, W) of generated images at which scores are compared, and their noise levels (B,)."""
        sigma = noise.sigma(sigmas)
        return noised(images, sigma, noise.noise), sigma

    def matching_gradient(self, batch: Batch, images: Tensor, fake: Tensor, target: Tensor) -> Tensor:
        """The gradient (B, C, H, W) at the generator's images that pulls them to the target's distribution."""
        return score_gradient(images, fake, target, self.weighting)

    def fake_score_loss(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            images = self.generate(batch, noise, labels)
            x, sigma = self.compared(batch, images, noise, self.fake_sigmas)
        loss = self.score_matching(images, self.fake_score(x, sigma, labels), sigma)
        if self.gan:
            classification = self.gan.classification(
                self.fake_score, images, labels, batch["image"], batch.get("label"), noise
            )
            self.log_mean("loss/gan_fake", classification.detach())
            loss = loss + self.gan.fake * classification
        return loss

    def two_sided_loss(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        """One backward pass: the generator's gradient holds the fake score fixed, the fake score's the images."""
        images = self.generate(batch, noise, labels)
        sigma = noise.sigma(self.fake_sigmas)
        x = noised(images.detach(), sigma, noise.noise)
        fake = self.fake_score(x, sigma, labels)
        with torch.no_grad():
            target = self.target.denoiser(x, sigma, labels)
            gradient = score_gradient(images, fake, target, self.weighting)
        self.log_generator(images, gradient, fake, target, sigma)
        return surrogate(images, gradient) + self.score_matching(images.detach(), fake, sigma)

    def score_matching(self, images: Tensor, estimate: Tensor, sigma: Tensor) -> Tensor:
        """Denoising score matching: how far the fake score's estimate of noised images at sigma (B,) is from them."""
        loss = self.estimate_loss(estimate - images, sigma)
        self.log_mean("loss/fake", loss.detach())
        return loss

    def estimate_loss(self, error: Tensor, sigma: Tensor) -> Tensor:
        """The mean loss of an estimate's error (B, C, H, W), as a sum over pixels with "edm" and as a mean with "dmd"."""
        loss = weighted_square(self.student, error, sigma).mean()
        return loss if self.weighting == "edm" else loss / error[0].numel()

    # -- how it goes -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_generator(self, images: Tensor, gradient: Tensor, fake: Tensor, target: Tensor, sigma: Tensor) -> None:
        """Diagnostics of a generator update; nothing here waits for the device."""
        images = images.detach()
        self.log_mean("loss/mismatch", weighted_square(self.student, target - fake, sigma).mean())
        for name, estimate in (("fake", fake), ("target", target)):
            self.log_mean(f"_misfit/{name}", weighted_square(self.student, estimate - images, sigma).mean())
        self.log_mean("score/image_gradient", gradient.flatten(1).norm(dim=1).mean())
        self.log_mean("generator/mean", images.mean())
        self.log_mean("generator/saturation", (images.abs() > 1).float().mean())
        pixels = images.double()  # of which a small spread is the difference of two large means
        self.log_mean("_pixels/mean", pixels.mean(0))
        self.log_mean("_pixels/square", pixels.square().mean(0))

    def metrics(self, means: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
        found = {name: value for name, value in means.items() if not name.startswith("_")}
        if "_pixels/mean" in means:
            # By how much the fake score fits the generator's images better than the target does, of the target's loss.
            found["score/lead"] = 1 - means["_misfit/fake"] / means["_misfit/target"]
            # Of each pixel over the batch, so that a collapse shows.
            variance = (means["_pixels/square"] - means["_pixels/mean"].square()).clamp_min(0)
            found["generator/std"] = (variance * self.batch_size / (self.batch_size - 1)).sqrt().mean().float()
        return found


def surrogate(images: Tensor, gradient: Tensor) -> Tensor:
    """A scalar, float32, whose gradient at the images is `gradient` / B: a mean over the batch."""
    return (gradient.float() * images.float()).flatten(1).sum(1).mean()


def check_sigma_init(sigma_init: float, teacher: Teacher) -> float:
    """Errors: ValueError outside of the noise levels that the teacher was trained for."""
    least, most = teacher.level_range
    if not least <= sigma_init <= most:
        raise ValueError(
            f"method.sigma_init={sigma_init!r} lies outside of the teacher's noise levels, {least:g} to {most:g}: choose one "
            "between them"
        )
    return float(sigma_init)

"""SiDA: score identity distillation with an adversarial term on the fake score's encoder (Zhou et al., arXiv 2410.14919)."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.components.method import Method
from lightning_modules.components.optimisation import Batch
from lightning_modules.sid import SiD
from stillhouse.checkpoints import load_weights, read_card
from stillhouse.diffusion.losses import estimate_error, noised, score_identity_loss
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.ranks import average_over_ranks


class SiDA(SiD):
    """SiD whose fake score is a discriminator too, without a weight of its own: the logits l(x), a map, are the mean over the
    channels of its features at the end of its encoder. With BCE = a mean over map and batch, noise and sigma as of SiD,

        fake score:  SiD's + mean lambda(sigma) [BCE(l(real + sigma e), 1) + BCE(l(y + sigma e), 0)] / 2
        generator:   1/2 SiD's + 1/2 gan_weight C H W mean(1 / w) BCE(clamp(l(x), -10, 10), 1)

    where both means and the BCEs are of the whole batch: its average realism enters each image's loss.

    A training begins with updates of the fake score alone, and the adversarial term joins the generator's loss later.

    Args:
        teacher: As of `SiD`.
        gan_weight: Of the adversarial term, for each number in an image.
        generator_kimg: Thousands of images before the generator's first update.
        gan_kimg: Thousands of images before the adversarial term joins the generator's loss.
        fake_clip: Largest absolute value in the fake score's gradient; None: no limit.
        start: The folder of a finished run of the same teacher, whose student the generator begins with (SiD2A); None: it begins
            with the teacher, as the fake score does in any case.
        options: As of `SiD`.

    Raises:
        ValueError: For options out of range.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        gan_weight: float = 1e-4,
        generator_kimg: float = 0.0,
        gan_kimg: float = 0.0,
        fake_clip: float | None = 1.0,
        start: str | None = None,
        **options: Any,
    ):
        super().__init__(teacher, **options)
        for option, value in (("gan_weight", gan_weight), ("fake_clip", 1.0 if fake_clip is None else fake_clip)):
            if not value > 0:
                raise ValueError(f"method.{option} must be a positive number, got {value!r}")
        for option, value in (("generator_kimg", generator_kimg), ("gan_kimg", gan_kimg)):
            if not value >= 0:
                raise ValueError(f"method.{option} must not be negative, got {value!r}")
        self.gan_weight, self.gan_nimg, self.fake_clip = gan_weight, 1000 * gan_kimg, fake_clip
        self.cycle_start = math.ceil(1000 * generator_kimg / self.batch_size)
        if self.cycle_start >= self.total_steps:
            raise ValueError(
                f"method.generator_kimg={generator_kimg} leaves the generator no update: lower it, or raise method.kimg"
            )
        if start is not None and self.nodes:
            raise ValueError("method.nodes is a path from the untrained generator: leave out it or method.start")
        self.start = start
        self.weight: Tensor | None = None  # of the BCE, in the step under way; see `prepare`

    @property
    def evaluations(self) -> dict[str, float]:
        cycled = 1 - self.cycle_start / self.total_steps
        generator = cycled / len(self.update_cycle)  # its updates, of all
        again = generator if self.checkpointing else 0.0
        first = generator if self.micro_batch else 0.0  # for the mean of 1 / w, see `prepare`
        return {
            "student": 1.0 + first,
            "fake score": 1.0 + again,
            "teacher": (generator + again + first) * self.target_evaluations,
            "fake score's encoder": 1 - generator,  # of real images
        }

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        return Method.training_data(self, data)

    def setup(self, stage: str) -> None:
        """Gives the generator its start, before a checkpoint is restored, which then has the last word."""
        super().setup(stage)
        if stage != "fit" or self.start is None:
            return
        weights = Path(self.start) / "student.safetensors"
        if not weights.is_file():
            raise ValueError(f"method.start={self.start} has no student.safetensors: give the folder of a finished run")
        if (other := read_card(weights).get("teacher")) != self.teacher.name:
            raise ValueError(
                f"method.start={self.start} was distilled from teacher {other}, not from {self.teacher.name}"
            )
        load_weights(weights, self.student.network)

    # -- the two updates -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Makes the mean of lambda(sigma), or of 1 / w, over the batch of all processes.

        1 / w is of the teacher's estimates: of a batch in one piece `generator_loss` has them, of one in micro-batches they are
        evaluated here.
        """
        self.weight = None
        if self.updating == ("fake_score",):
            noise, _ = self.noise_and_labels(batch)
            self.weight = self.batch_mean(self.fake_score.preconditioning.loss_weight(noise.sigma(self.fake_sigmas)))
        elif self.micro_batch and self.micro_batch < len(batch["position"]):
            self.weight = self.batch_mean(torch.cat([self.inverse_errors(part) for part in self.micro_batches(batch)]))
        return batch

    def batch_mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of values (b,) of this one's images."""
        return average_over_ranks({"mean": values.mean()}, self.device)["mean"]

    def inverse_errors(self, batch: Batch) -> Tensor:
        """1 / w of the generator's loss, (b,)."""
        noise, labels = self.noise_and_labels(batch)
        images, sigma = self.generate(batch, noise, labels), noise.sigma(self.generator_sigmas)
        return 1 / estimate_error(images, self.target.denoiser(noised(images, sigma, noise.noise), sigma, labels))

    def image_losses(
        self, images: Tensor, x: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        fake, features = self.evaluate(self.fake_score.with_features, x, sigma, labels)
        target = self.evaluate(self.target.denoiser, x, sigma, labels)
        losses = score_identity_loss(images, fake, target, self.alpha)
        realism = F.softplus(-logits(features).clamp(-10, 10)).mean(1)
        self.log_mean("loss/score_identity", losses.detach().mean())
        self.log_mean("loss/gan_generator", realism.detach().mean())
        if self.nimg >= self.gan_nimg:
            weight = self.batch_mean(1 / estimate_error(images, target)) if self.weight is None else self.weight
            losses = (losses + self.gan_weight * images[0].numel() * weight * realism) / 2
        return losses, fake, target

    def fake_score_loss(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            images = self.generate(batch, noise, labels)
        sigma = noise.sigma(self.fake_sigmas)
        estimate, features = self.fake_score.with_features(noised(images, sigma, noise.noise), sigma, labels)
        real = self.fake_score.encode(noised(batch["image"], sigma, noise.noise), sigma, batch.get("label"))
        classification = (F.softplus(-logits(real)).mean() + F.softplus(logits(features)).mean()) / 2
        self.log_mean("loss/gan_fake", classification.detach())
        return self.score_matching(images, estimate, sigma) + self.weight * classification

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.fake_clip is not None and self.updating == ("fake_score",):
            nn.utils.clip_grad_value_(optimizer.param_groups[0]["params"], self.fake_clip)


def logits(features: Tensor) -> Tensor:
    """A map of logits (B, h w), float32: the mean over the channels of features (B, D, h, w)."""
    return features.float().mean(1).flatten(1)

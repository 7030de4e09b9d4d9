"""Diff-Instruct: distil by the difference of two scores (Luo et al., arXiv 2305.18455), with DMD2's options."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from datamodules import DataFree
from lightning_modules.components.alternating import InTurns
from lightning_modules.components.diffused_gan import DiffusedGAN, GANOptions
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.losses import SCORE_WEIGHTINGS, noised, score_gradient, weighted_square
from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise, one_step, one_step_sampling
from stillhouse.ranks import averaged, gather_rows, rank_and_world


class DiffInstruct(InTurns):
    """A one-step generator G(z) = D_student(sigma_init z, sigma_init), pulled to the teacher's distribution by

        E_{z, sigma, e}  w(sigma) [s_fake(x_sigma) - s_target(x_sigma)] dG(z),   x_sigma = G(z) + sigma e,

    the gradient of the integral KL, where the fake score is trained beside it by denoising score matching on G's samples.
    One step is one turn on one batch of generated images: `fake_updates` turns of the fake score, then one of the
    generator. With `two_sided` every step is both, from one batch, one noise and one evaluation of each network.

    fake_lr_factor: the fake score's learning rate over `lr`. generator_sigmas, fake_sigmas: distributions of sigma in the two
    losses.
    weighting: w, see `score_gradient`; with "dmd" the losses are means over pixels, with "edm" sums, as in the released
    codes. labels: "uniform", or "data" with images. clip: largest norm of a network's gradient, None for no limit. gan: None,
    or the options of `DiffusedGAN`, which needs images.

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
        **common,
    ):
        super().__init__(**common)
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
        self.automatic_optimization = False
        self.teacher = self.target = teacher
        self.sigma_init = check_sigma_init(sigma_init, teacher)
        self.student = teacher.student().eval()  # no dropout, as in DMD2: both scores must see the same network
        self.fake = teacher.student().eval()
        self.gan = DiffusedGAN(self.fake.network, **gan) if gan else None
        self.generator_sigmas, self.fake_sigmas = generator_sigmas, fake_sigmas
        self.weighting, self.labels, self.clip = weighting, labels, clip
        self.fake_updates, self.two_sided = fake_updates, two_sided
        self.fake_lr = self.lr * fake_lr_factor
        self.student_updated = False
        self.seen: list[tuple[Tensor, ...]] = []  # what `watch` was told of the parts so far
        self.diagnostics: dict[str, Tensor] = {}  # of the latest turn of either kind

    @property
    def turns(self) -> int:
        """Steps from one update of the generator to the next."""
        return 1 if self.two_sided else self.fake_updates + 1

    @property
    def student_updates(self) -> int:
        return self.trainer.global_step // self.turns

    @property
    def evaluations(self) -> dict[str, float]:
        counts = {"student": 1.0, "fake score": 1.0, "teacher": 1 / self.turns}
        # The encoder alone: of a generated and a real image in a turn of the fake score, of a generated one in the generator's.
        return counts | ({"fake score's encoder": (2 * self.fake_updates + 1) / self.turns} if self.gan else {})

    @property
    def peak_lrs(self) -> list[float]:
        return [self.lr, self.fake_lr]

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        return data if self.gan or (self.labels == "data" and data.num_classes) else DataFree(self.batch_size)

    def configure_optimizers(self) -> Any:
        guide = [self.fake, self.gan] if self.gan else [self.fake]
        fused = not (self.clip and self.scaler)  # a fused step would undo the loss scale only after the clipping
        return self.adam(self.student.parameters(), fused), self.adam(nn.ModuleList(guide).parameters(), fused)

    def generate(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        return one_step(self.student, noise, self.sigma_init, labels)

    def sampling(self) -> Sampling:
        return one_step_sampling(self.student, self.sigma_init)

    def on_fit_start(self) -> None:
        self.target.to(self.device)
        self.diagnostics = {key: value.to(self.device) for key, value in self.diagnostics.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["diagnostics"] = {key: value.cpu() for key, value in averaged(self.diagnostics, self.device).items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.diagnostics = dict(checkpoint["diagnostics"])

    # -- the two turns ---------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.student_updated = (self.trainer.global_step + 1) % self.turns == 0
        step = self.both_turns if self.two_sided else self.generator_turn if self.student_updated else self.fake_turn
        loss = self.take(step, batch)
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            # Of both turns: these steps may always meet the same one.
            self.log_means(self.diagnostics, stepped=True)
        return loss

    def take(self, turn: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
        """One turn, part by part; returns the loss of the whole batch, to which each part adds its own."""
        for part in self.parts(batch):
            random = TrainingNoise(self.seed, part["position"], self.image_shape)
            labels = random.labels(self.teacher.num_classes) if self.labels == "uniform" else part.get("label")
            loss = turn(random, labels, part)
        return loss

    def all_passes(self, batch: dict[str, Tensor]) -> None:
        for turn in (self.both_turns,) if self.two_sided else (self.fake_turn, self.generator_turn):
            self.take(turn, batch)

    def generator_turn(self, random: TrainingNoise, labels: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
        images = self.generate(random.latents, labels)
        with torch.no_grad():
            sigma = random.sigma(self.generator_sigmas)
            x = noised(images, sigma, random.noise)
            fake, target = self.fake(x, sigma, labels), self.target.denoiser(x, sigma, labels)
            gradient = score_gradient(images, fake, target, self.weighting)
            if self.gan:
                more, told_apart = self.gan.image_gradient(self.fake, images, random, labels)
                self.tally(self.diagnostics, "loss/gan_generator", told_apart)
                gradient += more
        self.watch(images, gradient, fake, target, sigma)
        self.descend(0, surrogate(images, gradient))
        return self.diagnostics["loss/mismatch"]

    def fake_turn(self, random: TrainingNoise, labels: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            images = self.generate(random.latents, labels)
        sigma = random.sigma(self.fake_sigmas)
        loss = self.fake_loss(images, self.fake(noised(images, sigma, random.noise), sigma, labels), sigma)
        if self.gan:
            told_apart = self.gan.classification(self.fake, images, labels, batch["image"], batch.get("label"), random)
            self.tally(self.diagnostics, "loss/gan_fake", told_apart.detach())
            loss = loss + self.gan.fake * told_apart
        self.descend(1, loss)
        return self.guide_loss()

    def both_turns(self, random: TrainingNoise, labels: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
        """One backward pass: the generator's gradient holds the fake score fixed, the fake score's the images."""
        images = self.generate(random.latents, labels)
        sigma = random.sigma(self.fake_sigmas)
        x = noised(images.detach(), sigma, random.noise)
        fake = self.fake(x, sigma, labels)
        with torch.no_grad():
            target = self.target.denoiser(x, sigma, labels)
            gradient = score_gradient(images, fake, target, self.weighting)
        self.watch(images, gradient, fake, target, sigma)
        loss = self.fake_loss(images.detach(), fake, sigma)
        self.descend(None, surrogate(images, gradient) + loss)
        return self.guide_loss()

    def fake_loss(self, images: Tensor, estimate: Tensor, sigma: Tensor) -> Tensor:
        """Denoising score matching, as a sum over pixels with "edm" and as a mean with "dmd"."""
        loss = weighted_square(self.student, estimate - images, sigma).mean()
        loss = loss if self.weighting == "edm" else loss / images[0].numel()
        self.tally(self.diagnostics, "loss/fake", loss.detach())
        return loss

    def guide_loss(self) -> Tensor:
        """What the latest turn of the fake score descended, of the whole batch."""
        loss = self.diagnostics["loss/fake"]
        return loss + self.gan.fake * self.diagnostics["loss/gan_fake"] if self.gan else loss

    @torch.no_grad()
    def watch(self, images: Tensor, gradient: Tensor, fake: Tensor, target: Tensor, sigma: Tensor) -> None:
        """Diagnostics of a generator's update, with its last part; nothing here waits for the device."""
        self.tally(self.diagnostics, "loss/mismatch", weighted_square(self.student, target - fake, sigma).mean())
        self.seen.append((images.detach(), gradient, fake, target, sigma))
        if not self.part.last:
            return
        if len(self.seen) > 1:  # of the whole batch: a spread over it is no mean of the parts'
            images, gradient, fake, target, sigma = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen = []
        world = rank_and_world()[1]
        if world > 1 and self.row_follows() and not self.rehearsing:
            shares = (images, gradient, fake, target, sigma)
            images, gradient, fake, target, sigma = (gather_rows(x, world * len(x)) for x in shares)
        fits = [weighted_square(self.student, estimate - images, sigma).mean() for estimate in (fake, target)]
        self.diagnostics |= {
            # By how much the fake score fits the generator's images better than the target does, of the target's loss.
            "score/lead": 1 - fits[0] / fits[1],
            "score/image_gradient": gradient.flatten(1).norm(dim=1).mean(),
            "generator/mean": images.mean(),
            "generator/std": images.std(0).mean(),  # over the batch, so that a collapse shows
            "generator/saturation": (images.abs() > 1).float().mean(),
        }

    def row_follows(self) -> bool:
        """Whether the diagnostics of the generator's update under way are written, with this step or before the next update."""
        return -(self.trainer.global_step + 1) % self.trainer.log_every_n_steps < self.turns


def surrogate(images: Tensor, gradient: Tensor) -> Tensor:
    """A scalar, float32, whose gradient at the images is `gradient` / B: a mean over the batch."""
    return (gradient.float() * images.float()).flatten(1).sum(1).mean()


def check_sigma_init(sigma_init: float, teacher: Teacher) -> float:
    """Errors: ValueError outside of the noise levels that the teacher was trained for."""
    sigmas = teacher.sigmas(max(teacher.steps, 2))
    least, most = sigmas[-2].item(), sigmas[0].item()
    if not least <= sigma_init <= most:
        raise ValueError(
            f"method.sigma_init={sigma_init!r} lies outside of the teacher's noise levels, {least:g} to {most:g}: choose one "
            "between them"
        )
    return float(sigma_init)

"""Diff-Instruct: distil by the difference of two scores (Luo et al., arXiv 2305.18455), with DMD2's options."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules import DataFree
from diffusion.losses import SCORE_WEIGHTINGS, denoising_score_matching, score_gradient
from diffusion.noise_levels import NoiseLevels
from diffusion.seeds import position_noise, position_uniform
from diffusion.teacher import Teacher
from lightning_modules.base import Method
from networks import Discriminator
from networks.checks import check_choice, check_counts

# What each random number of a training sample is for.
_LATENT, _LABEL, _SIGMA, _NOISE, _GAN_SIGMA, _GAN_NOISE, _REAL_NOISE = range(7)


class DiffInstruct(Method):
    """A one-step generator G(z) = D_student(sigma_init z, sigma_init), pulled to the teacher's law by

        E_{z, sigma, e}  w(sigma) [s_fake(x_sigma) - s_target(x_sigma)] dG(z),   x_sigma = G(z) + sigma e,

    the gradient of the integral KL, where the fake score is trained beside it by denoising score matching on G's samples.
    One step is one turn on one batch of generated images: `fake_updates` turns of the fake score, then one of the
    generator. With `two_sided` every step is both, from one batch, one noise and one evaluation of each network.

    generator_sigmas, fake_sigmas: laws of sigma in the two losses. weighting: w, see `score_gradient`; with "dmd" the
    losses are means over pixels, with "edm" sums, as in the released codes. labels: "uniform", or "data" with images.
    clip: largest norm of a network's gradient, None for no limit. gan: None, or a dict of `generator` and `fake` (weights of
    the GAN's losses, on the scale of the others) and `sigmas` (the law of the noise on its images): DMD2's (arXiv 2405.14867,
    released code) classifier on the fake score's encoder, which needs images.

    Labels, latents and noise of a training sample depend on (seed, its position) alone: two processes do what one does.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        sigma_init: float,
        generator_sigmas: NoiseLevels,
        fake_sigmas: NoiseLevels,
        weighting: str = "edm",
        fake_updates: int = 1,
        fake_lr: float | None = None,
        labels: str = "uniform",
        two_sided: bool = False,
        clip: float | None = None,
        gan: dict[str, Any] | None = None,
        **common,
    ):
        super().__init__(**common)
        check_counts(**{"method.fake_updates": fake_updates})
        check_choice("method.weighting", weighting, SCORE_WEIGHTINGS)
        check_choice("method.labels", labels, ("uniform", "data"))
        for option, value in (("fake_lr", fake_lr), ("clip", clip)):
            if value is not None and (not isinstance(value, int | float) or not value > 0):
                raise ValueError(f"method.{option} must be a positive number or null, got {value!r}")
        if two_sided and (fake_updates != 1 or generator_sigmas != fake_sigmas or gan):
            raise ValueError(
                "method.two_sided shares one noise between both updates: it needs method.fake_updates=1, equal "
                "method.generator_sigmas and method.fake_sigmas, and no method.gan"
            )
        if gan is not None and set(gan) != {"generator", "fake", "sigmas"}:
            raise ValueError(f"method.gan must be null or have the keys generator, fake and sigmas, got {sorted(gan)}")
        self.automatic_optimization = False
        self.teacher = self.target = teacher
        self.sigma_init = check_sigma_init(sigma_init, teacher)
        self.student = teacher.student().eval()  # no dropout, as in DMD2: both scores must see the same network
        self.fake = teacher.student().eval()
        self.discriminator = Discriminator(self.fake.network) if gan else None
        self.generator_sigmas, self.fake_sigmas = generator_sigmas, fake_sigmas
        self.weighting, self.labels, self.gan, self.clip = weighting, labels, gan, clip
        self.fake_updates, self.two_sided = fake_updates, two_sided
        self.fake_lr = self.lr if fake_lr is None else fake_lr
        self.student_updated = False
        self._latest: dict[str, Tensor] = {}

    @property
    def student_updates(self) -> int:
        return self.trainer.global_step // (1 if self.two_sided else self.fake_updates + 1)

    @property
    def peak_lrs(self) -> list[float]:
        return [self.lr, self.fake_lr]

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        return data if self.gan or (self.labels == "data" and data.num_classes) else DataFree(self.batch_size)

    def configure_optimizers(self) -> Any:
        guide = [self.fake, self.discriminator] if self.gan else [self.fake]
        return self.adam(self.student.parameters()), self.adam(nn.ModuleList(guide).parameters())

    def generate(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        return one_step(self.student, noise, self.sigma_init, labels)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["latest"] = {key: value.cpu() for key, value in self._latest.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._latest = dict(checkpoint["latest"])

    # -- the two turns ---------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        turn = self.trainer.global_step % (self.fake_updates + 1)
        self.student_updated = self.two_sided or turn == self.fake_updates
        step = self.both_turns if self.two_sided else self.generator_turn if self.student_updated else self.fake_turn
        loss = step(batch)
        self.log_dict(self._latest)  # every step shows both turns: logging is seldom, and may always meet the same one
        return loss

    def generator_turn(self, batch: dict[str, Tensor]) -> Tensor:
        z, labels = self.latents(batch)
        images = self.generate(z, labels)
        with torch.no_grad():
            sigma, noised = self.noised(images, batch, self.generator_sigmas)
            fake, target = self.fake(noised, sigma, labels), self.target.denoiser(noised, sigma, labels)
            gradient = score_gradient(images, fake, target, self.weighting)
        if self.gan:
            gradient = gradient + self.gan_gradient(images, batch, labels)
        self.watch(images, gradient, fake, target, sigma)
        self.descend(0, surrogate(images, gradient))
        return self._latest["loss/mismatch"]

    def fake_turn(self, batch: dict[str, Tensor]) -> Tensor:
        z, labels = self.latents(batch)
        with torch.no_grad():
            images = self.generate(z, labels)
        u, noise = self.uniform(batch, _SIGMA), self.normal(batch, _NOISE, images.shape[1:])
        loss = self.scale(denoising_score_matching(self.fake, images, self.fake_sigmas(u), noise, labels).mean())
        self._latest["loss/fake"] = loss.detach()
        if self.gan:
            loss = loss + self.classification(images, batch, labels)
        self.descend(1, loss)
        return loss.detach()

    def both_turns(self, batch: dict[str, Tensor]) -> Tensor:
        """One backward pass: the generator's gradient holds the fake score fixed, the fake score's the images."""
        z, labels = self.latents(batch)
        images = self.generate(z, labels)
        fixed = images.detach()
        sigma, noised = self.noised(fixed, batch, self.fake_sigmas)
        fake = self.fake(noised, sigma, labels)
        with torch.no_grad():
            target = self.target.denoiser(noised, sigma, labels)
            gradient = score_gradient(fixed, fake, target, self.weighting)
        self.watch(fixed, gradient, fake.detach(), target, sigma)
        loss = self.scale(self.weighted(fake - fixed, sigma).mean())
        self._latest["loss/fake"] = loss.detach()
        self.descend(None, surrogate(images, gradient) + loss)
        return loss.detach()

    def descend(self, which: int | None, loss: Tensor) -> None:
        """A step of optimiser 0 (generator) or 1 (fake score), or None: of both, which counts as one step."""
        optimizers = self.optimizers()
        chosen = optimizers if which is None else [optimizers[which]]
        for optimizer in chosen:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in chosen:
            if self.clip:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip)
            # Lightning counts the steps of its wrappers alone.
            (optimizer if optimizer is chosen[0] else optimizer.optimizer).step()

    # -- DMD2's classifier -----------------------------------------------------------------------------------------

    def realism(self, images: Tensor, batch: dict[str, Tensor], labels: Tensor | None, stream: int) -> Tensor:
        """The classifier's logit (B, 1) of images at a random noise level, from the fake score's encoder."""
        sigma = self.gan["sigmas"](self.uniform(batch, _GAN_SIGMA))
        noised = images + sigma.view(-1, 1, 1, 1) * self.normal(batch, stream, images.shape[1:])
        return self.discriminator(self.fake.encode(noised, sigma, labels))

    def gan_gradient(self, images: Tensor, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        """d softplus(-logit) / d images: taken at the images alone, so that none reaches fake score or classifier."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            loss = F.softplus(-self.realism(leaf, batch, labels, _GAN_NOISE)).sum()
        self._latest["loss/gan_generator"] = loss.detach() / len(images)
        return self.gan["generator"] * torch.autograd.grad(loss, leaf)[0]

    def classification(self, fakes: Tensor, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        fake = self.realism(fakes, batch, labels, _GAN_NOISE)
        real = self.realism(batch["image"], batch, batch.get("label"), _REAL_NOISE)
        loss = (F.softplus(fake) + F.softplus(-real)).mean()
        self._latest["loss/gan_fake"] = loss.detach()
        return self.gan["fake"] * loss

    # -- random numbers --------------------------------------------------------------------------------------------

    def uniform(self, batch: dict[str, Tensor], stream: int) -> Tensor:
        return position_uniform(self.seed, batch["position"], stream)

    def normal(self, batch: dict[str, Tensor], stream: int, shape: torch.Size) -> Tensor:
        return position_noise(self.seed, batch["position"], shape, stream)

    def latents(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """z (B, C, H, W) and labels (B,), or None where the teacher takes none."""
        network = self.student.network
        z = self.normal(batch, _LATENT, (network.in_channels, network.resolution, network.resolution))
        if not self.teacher.num_classes:
            return z, None
        if self.labels == "data":
            return z, batch["label"]
        return z, (self.uniform(batch, _LABEL) * self.teacher.num_classes).long()

    def noised(self, images: Tensor, batch: dict[str, Tensor], law: NoiseLevels) -> tuple[Tensor, Tensor]:
        sigma = law(self.uniform(batch, _SIGMA))
        return sigma, images + sigma.view(-1, 1, 1, 1) * self.normal(batch, _NOISE, images.shape[1:])

    # -- scales and diagnostics ------------------------------------------------------------------------------------

    def scale(self, loss: Tensor) -> Tensor:
        """A sum over pixels as "edm" has it; "dmd" takes the mean."""
        network = self.student.network
        return loss if self.weighting == "edm" else loss / (network.in_channels * network.resolution**2)

    def weighted(self, error: Tensor, sigma: Tensor) -> Tensor:
        """lambda(sigma) |error|^2, (B,), as in `denoising_score_matching`."""
        return self.student.preconditioning.loss_weight(sigma) * error.square().flatten(1).sum(1)

    @torch.no_grad()
    def watch(self, images: Tensor, gradient: Tensor, fake: Tensor, target: Tensor, sigma: Tensor) -> None:
        """Diagnostics of a generator's update; nothing here waits for the device."""
        fits = [self.weighted(estimate - images, sigma).mean() for estimate in (fake, target)]
        self._latest |= {
            "loss/mismatch": self.weighted(target - fake, sigma).mean(),
            # By how much the fake score fits the generator's images better than the target does, of the target's loss.
            "score/lead": 1 - fits[0] / fits[1],
            "score/image_gradient": gradient.flatten(1).norm(dim=1).mean(),
            "generator/mean": images.mean(),
            "generator/std": images.std(0).mean(),  # over the batch, so that a collapse shows
            "generator/saturation": (images.abs() > 1).float().mean(),
        }


def one_step(denoiser: nn.Module, noise: Tensor, sigma_init: float, labels: Tensor | None) -> Tensor:
    """G(z) = D(sigma_init z, sigma_init), (B, C, H, W) of unit normal noise."""
    sigma = noise.new_full((), sigma_init)
    return denoiser(noise * denoiser.preconditioning.prior_std(sigma), sigma, labels)


def surrogate(images: Tensor, gradient: Tensor) -> Tensor:
    """A scalar, float32, whose gradient at the images is `gradient` / B: a mean over the batch."""
    return (gradient.float() * images.float()).flatten(1).sum(1).mean()


def check_sigma_init(sigma_init: float, teacher: Teacher) -> float:
    """Errors: ValueError outside of the noise levels that the teacher was trained for."""
    sigmas = teacher.sigmas(max(teacher.steps, 2))
    least, most = sigmas[-2].item(), sigmas[0].item()
    if not isinstance(sigma_init, int | float) or not least <= sigma_init <= most:
        raise ValueError(
            f"method.sigma_init={sigma_init!r} lies outside of the teacher's noise levels, {least:g} to {most:g}: choose one "
            "between them"
        )
    return float(sigma_init)

"""Moment matching: distil into an ancestral sampler of few steps (Salimans et al., arXiv 2406.04103, algorithm 2)."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.components.method import Method, check_nfe
from lightning_modules.components.optimisation import Batch
from lightning_modules.diff_instruct import DiffInstruct
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.noise_levels import KarrasUniform, NoiseLevelDistribution
from stillhouse.diffusion.sampling import Sampling, one_step_sampling
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.solvers import ancestral_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise

TIMES = ("continuous", "grid")


class MomentMatching(DiffInstruct):
    """A generator x~ = G(z_t, t) for ancestral sampling in k steps, from an image with noise of level t, trained so that

        E[x~ | z_s] = T(z_s, s),   z_s ~ q(z_s | z_t, x~),

    the clean image that is expected where sampling gets to is the teacher's estimate T, at all levels s up to a step below t. An
    auxiliary denoiser A, Diff-Instruct's fake score, learns that expectation, held near the teacher. Updates in turn lower

        A:  w(s) [ |x~ - A(z_s, s)|^2 + |T(z_s, s) - A(z_s, s)|^2 ],   G:  v(s) < x~, sg[A(z_s, s) - T(z_s, s)] >,

    with z_s held fixed, w = 1 / c_out^2 and v the weighting of Diff-Instruct's generator. A's optimum lies midway between
    E[x~ | z_s] and T.

    Times are places between the teacher's lowest level (0) and its highest (1) on the scale of EDM's schedule. s is uniform, and

    - "continuous": t = min(s + d, 1) with d uniform in (0, 1/k), as published: the student then takes k steps or more;
    - "grid": t is the end of the step of the sampler in which s lies: the student takes k steps alone.

    At the highest level z_t is pure noise, with which sampling begins.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        steps: int = 4,
        times: str = "continuous",
        linear_decay: bool = True,
        **options: Any,
    ):
        """Args beside those of `DiffInstruct`, of which it takes weighting, fake_updates, fake_lr_factor and clip.

        Args:
            teacher: As of `DiffInstruct`.
            steps: k, the fewest steps of a sample.
            times: "continuous" or "grid".
            linear_decay: Whether the learning rates fall to zero, linearly over the whole training.

        Raises:
            ValueError: For options out of range.
        """
        check_counts(**{"method.steps": steps})
        check_choice("method.times", times, TIMES)
        lowest, highest = teacher.level_range
        levels = KarrasUniform(lowest, highest)
        super().__init__(
            teacher,
            sigma_init=highest,
            generator_sigmas=levels,
            fake_sigmas=levels,
            labels="data",
            two_sided=False,
            gan=None,
            nodes=0,
            **options,
        )
        self.steps, self.times, self.linear_decay = steps, times, linear_decay
        self.level, self.lowest = levels, lowest
        self.start_scale = one_step_sampling(self.student, highest).scale

    def lr_scale(self) -> float:
        return super().lr_scale() * (1 - self.progress if self.linear_decay else 1)

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": 1.0, "fake score": 1.0, "teacher": self.target_evaluations}

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        return Method.training_data(self, data)

    def sampling(self, nfe: int | None = None) -> Sampling:
        """Ancestral steps between levels of Karras' spacing, of which the last one is the estimate."""
        if self.times == "grid":
            nfe = check_nfe(nfe, self.steps)
        elif nfe is not None and nfe < self.steps:
            raise ValueError(f"steps={nfe}: the student takes {self.steps} or more")
        inner = karras_grid(nfe or self.steps, self.lowest, self.sigma_init)[1:-1].tolist()
        return Sampling([self.sigma_init, *inner, 0.0], self.start_scale, "ancestral")

    # -- its states ------------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        return self.student(*self.student_input(batch, noise), labels)

    def student_input(self, batch: Batch, noise: TrainingNoise) -> tuple[Tensor, Tensor]:
        """z_t (B, C, H, W) of training samples, and their noise levels (B,)."""
        if self.times == "grid":
            time = ((noise.place * self.steps).floor() + 1) / self.steps
        else:
            time = (noise.place + noise.place_in_step / self.steps).clamp(max=1)
        sigma = self.level(time)
        inside = (time < 1)[:, None, None, None]
        x = noised(batch["image"], sigma, noise.latents)
        return torch.where(inside, x, self.start_scale * noise.latents), sigma

    def compared(
        self, batch: Batch, images: Tensor, noise: TrainingNoise, sigmas: NoiseLevelDistribution
    ) -> tuple[Tensor, Tensor]:
        """z_s (B, C, H, W), sampled from q(z_s | z_t, images), and the noise levels s (B,)."""
        x, sigma = self.student_input(batch, noise)
        following = noise.sigma(sigmas)
        levels = (level[:, None, None, None] for level in (sigma, following))
        return ancestral_step(x, images, *levels, noise.noise), following

    # -- the auxiliary denoiser ------------------------------------------------------------------------------------

    def fake_score_loss(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            images = self.generate(batch, noise, labels)
            x, sigma = self.compared(batch, images, noise, self.fake_sigmas)
            target = self.target.denoiser(x, sigma, labels)
        estimate = self.fake_score(x, sigma, labels)
        near_teacher = self.estimate_loss(estimate - target, sigma)
        self.log_mean("loss/near_teacher", near_teacher.detach())
        return self.score_matching(images, estimate, sigma) + near_teacher

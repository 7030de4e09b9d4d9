"""Consistency distillation: one step from anywhere on a teacher's path to its end (Song et al., arXiv 2303.01469)."""

import copy

import torch
from torch import Tensor

from lightning_modules.components.method import Method, check_nfe
from stillhouse.checks import check_counts
from stillhouse.diffusion.distance import Distance
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.preconditioning import Consistency
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.solvers import euler_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise


class ConsistencyDistillation(Method):
    """min_f E d(f(x_t, t), f_target(x_r, r)) at neighbouring noise levels t > r, with f(x, sigma_min) = x.

    x_t = x0 + t e for a real image x0, and x_r is the teacher's Heun step from there to r (algorithm 2). f_target is an
    exponential moving average of f, and gets no gradient.

    Args:
        teacher: Its network is the student's beginning; its highest noise level is where sampling starts.
        levels: Noise levels of the discretised path (N).
        sigma_min: The lowest one, at which the student is the identity.
        rho: Of Karras' spacing of the levels (EDM, arXiv 2206.00364, equation 5).
        target_decay: Of f_target, per update, in [0, 1).
        middle: The noise level of the second step of a sample with two network evaluations.
        loss: d, "l2", "l1", "huber" (sums over pixels), "lpips" or "lpips+l2".
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        levels: int = 18,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        target_decay: float = 0.95,
        middle: float = 0.8,
        loss: str = "l2",
        **common,
    ):
        super().__init__(**common)
        check_counts(2, **{"method.levels": levels})
        if not 0 <= target_decay < 1:
            raise ValueError(f"method.target_decay must lie in [0, 1), got {target_decay!r}")
        high = teacher.sigmas()[0].item()
        if not sigma_min < middle < high:
            raise ValueError(
                f"method.middle must lie between method.sigma_min={sigma_min:g} and {high:g}, got {middle!r}"
            )
        self.teacher = teacher
        self.student = teacher.student().eval()  # no dropout: both sides of the loss see the same network
        self.student.preconditioning = Consistency(self.student.preconditioning, sigma_min)
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.target_decay, self.middle, self.sigma_min = target_decay, middle, sigma_min
        grid = karras_grid(levels - 1, sigma_min, high, rho)
        self.register_buffer("sigmas", grid.float(), persistent=False)
        self.distance = Distance(loss, self.image_shape)

    def frozen_networks(self) -> list:
        return [*super().frozen_networks(), self.distance]

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": 1.0, "target": 1.0, "teacher": 2.0}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, labels = batch["image"], batch.get("label")
        noise = TrainingNoise(self.seed, batch["position"], images.shape[1:])
        level = noise.indices(len(self.sigmas) - 1)
        t, r = self.sigmas[level], self.sigmas[level + 1]
        x = noised(images, t, noise.noise)
        with torch.no_grad():
            target = self.target(self.heun_step(x, t, r, labels), r, labels)
        loss = self.distance(self.student(x, t, labels), target).mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    def heun_step(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        """The teacher's step from x (B, C, H, W) at levels t (B,) to levels r (B,)."""
        labels = labels if self.teacher.conditional else None
        t_, r_ = t[:, None, None, None], r[:, None, None, None]
        estimate = self.teacher.denoiser(x, t, labels)
        end = euler_step(x, estimate, t_, r_)
        slope = ((x - estimate) / t_ + (end - self.teacher.denoiser(end, r, labels)) / r_) / 2
        return x + (r_ - t_) * slope

    @torch.no_grad()
    def after_update(self) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - self.target_decay)

    def sampling(self, nfe: int | None = None) -> Sampling:
        levels = [self.sigmas[0].item(), self.middle][: check_nfe(nfe, 1, 2)]
        scale = self.student.preconditioning.prior_std(self.sigmas[0]).item()
        return Sampling([*levels, 0.0], scale, "renoising", {"sigma_min": self.sigma_min}, double=False)

"""Consistency distillation: one step from anywhere on a teacher's path to its end (CD, Song et al., arXiv 2303.01469)."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.components.consistency import ConsistencyMethod, per_image
from stillhouse.checks import check_counts
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.distance import Distance
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.preconditioning import Consistency
from stillhouse.diffusion.random_numbers import SharedMasks, TrainingStream, position_noise, position_uniforms
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.teacher import Teacher


class ConsistencyDistillation(ConsistencyMethod):
    """min_f E d(f(x_t, t), sg f_target(x_r, r)) at neighbouring levels t > r of Karras' grid, with f(x, sigma_min) = x.

    f begins as the teacher, read with a boundary at sigma_min. x_t = x0 + t z for a real image x0, and x_r is the teacher's Heun
    step from there to r (algorithm 2). f_target is an exponential moving average of f, or f itself without a gradient. Both
    passes have equal dropout masks.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        levels: int = 18,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        target_halflife: float = 0.0,
        loss: str = "l2",
        lpips_weights: str | None = None,
        lpips_resize: int | None = None,
        middle: float | Sequence[float] = 0.8,
        **common,
    ):
        """Args beside those of `ConsistencyMethod`.

        Args:
            teacher: As there.
            levels: Noise levels of the grid (N), from the teacher's highest one down to `sigma_min`.
            sigma_min: The lowest one, at which the student is the identity.
            rho: Of Karras' spacing (EDM, arXiv 2206.00364, equation 5).
            target_halflife: Of f_target's average, in thousands of images; 0: f_target is f. A decay of mu per update of a batch
                of B images is a half-life of B ln(0.5) / ln(mu) / 1000.
            loss: d, "l2", "l1", "huber" (sums over pixels), "lpips" or "lpips+l2" (`stillhouse.diffusion.distance`).
            lpips_weights: As of `Distance`.
            lpips_resize: As of `Distance`; published: 224.
            middle: As there.

        Raises:
            ValueError: For options out of range.
        """
        highest = teacher.sigmas()[0].item()
        if not 0 < sigma_min < highest:
            raise ValueError(
                f"method.sigma_min must lie between 0 and the teacher's highest level {highest:g}, got {sigma_min!r}"
            )
        super().__init__(teacher, middle=middle, lowest=sigma_min, **common)
        check_counts(2, **{"method.levels": levels})
        if not rho > 0:
            raise ValueError(f"method.rho must be positive, got {rho!r}")
        if not target_halflife >= 0:
            raise ValueError(
                f"method.target_halflife must not be negative, got {target_halflife!r}; 0: the target is the student itself"
            )
        self.student.preconditioning = Consistency(self.student.preconditioning, sigma_min)
        self.average: Denoiser | None = None
        if target_halflife:
            self.average = copy.deepcopy(self.student).requires_grad_(False)
            self.target_decay = 0.5 ** (self.batch_size / (1000 * target_halflife))
        grid = karras_grid(levels - 1, sigma_min, highest, rho)
        self.register_buffer("sigmas", grid.float(), persistent=False)
        self.distance = Distance(loss, self.image_shape, lpips_weights, lpips_resize)

    def frozen_networks(self) -> list[Any]:
        return [*super().frozen_networks(), self.distance]

    @property
    def evaluations(self) -> dict[str, float]:
        target = "student without gradient" if self.average is None else "target"
        return {"student": 1.0, target: 1.0, "teacher": 2.0 * self.teacher.evaluations_per_estimate}

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, position, labels = batch["image"], batch["position"], batch.get("label")
        (uniform,) = position_uniforms(self.seed, position, TrainingStream.UNIFORMS, 1)
        z = position_noise(self.seed, position, images.shape[1:], TrainingStream.NORMALS)
        n = (uniform * (len(self.sigmas) - 1)).long()
        t, r = self.sigmas[n], self.sigmas[n + 1]
        x_t = noised(images, t, z)
        masks = SharedMasks()
        with masks:
            output = self.student(x_t, t, labels)
        with torch.no_grad():
            x_r = x_t - per_image(t - r) * self.step_slope("heun", x_t, t, r, labels)
            with masks:
                target = (self.average or self.student)(x_r, r, labels)
        loss = self.distance(output, target).mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    @torch.no_grad()
    def after_update(self) -> None:
        if self.average is not None:
            average, student = self.average.parameters(), self.student.parameters()
            torch._foreach_lerp_(list(average), list(student), 1 - self.target_decay)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        """As of other consistency models, but that an estimate is at noise level `sigma_min`."""
        return replace(super().sampling(nfe), options={"sigma_min": self.lowest})

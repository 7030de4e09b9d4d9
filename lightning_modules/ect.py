"""Easy consistency tuning: a diffusion model becomes a consistency model (ECT, Geng et al., arXiv 2406.14548)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.components.consistency import TEACHER_STEPS, ConsistencyMethod, per_image
from stillhouse.checks import check_above, check_choice
from stillhouse.diffusion.losses import noised, pseudo_huber
from stillhouse.diffusion.noise_levels import LogNormal
from stillhouse.diffusion.random_numbers import SharedMasks, TrainingStream, position_noise, position_uniforms
from stillhouse.diffusion.teacher import Teacher

WEIGHTINGS = ("step", "c_out")


class ECT(ConsistencyMethod):
    """min_f E w(t, r) d(f(x_t, t), sg f(x_r, r)) at noise levels t > r that come nearer to each other from stage to stage:

        ln t ~ N(p_mean, p_std^2),   r = max(0, t [1 - q^-(a+1) (1 + k sigmoid(-b t))]) in stage a = 0, 1, ...

    f = D_student begins as the teacher, and f(x, 0) = x. x_t = x0 + t z and x_r = x0 + r z share an image x0 and noise z; with
    `teacher_step` x_r is the teacher's step from x_t (distillation). d(a, b) = sqrt(|a - b|^2 + c^2) - c over all pixels. Both
    passes have equal dropout masks, and sg is the student itself without a gradient, no average of it.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        p_mean: float = -1.1,
        p_std: float = 2.0,
        q: float = 2.0,
        k: float = 8.0,
        b: float = 1.0,
        stage_kimg: float | None = None,
        max_ratio: float | None = None,
        weighting: str = "step",
        c: float = 0.0,
        teacher_step: str | None = None,
        middle: float | Sequence[float] = 0.821,
        **common,
    ):
        """Args beside those of `ConsistencyMethod`.

        Args:
            teacher: As there.
            p_mean: Of ln t.
            p_std: Of ln t.
            q: Above 1, by which the distance t - r is divided from stage to stage.
            k: How much larger the distance is at small t.
            b: How fast that fades with t.
            stage_kimg: Length of a stage in thousands of images; None: there is one.
            max_ratio: The greatest 1 - q^-(a+1), below 1: it ends the stages. None: no limit.
            weighting: w, "step": 1 / (t - r), or "c_out": 1 / c_out(t)^2.
            c: Of the pseudo-Huber distance; 0: the Euclidean one.
            teacher_step: None: consistency training. "euler" or "heun": x_r is one such step of the teacher from x_t.
            middle: As there.

        Raises:
            ValueError: For options out of range.
        """
        super().__init__(teacher, middle=middle, **common)
        check_above(0, **{"method.p_std": p_std})
        check_above(1, **{"method.q": q})
        if stage_kimg is not None:
            check_above(0, **{"method.stage_kimg": stage_kimg})
        for option, value in (("k", k), ("b", b), ("c", c)):
            if value < 0:
                raise ValueError(f"method.{option} must not be negative, got {value!r}")
        if max_ratio is not None and not 0 < max_ratio < 1:
            raise ValueError(f"method.max_ratio must lie between 0 and 1, got {max_ratio!r}; null: no limit")
        check_choice("method.weighting", weighting, WEIGHTINGS)
        check_choice("method.teacher_step", teacher_step, (None, *TEACHER_STEPS))
        self.noise_levels = LogNormal(p_mean, p_std)
        self.q, self.k, self.b, self.max_ratio = q, k, b, max_ratio
        self.stage_nimg = 1000 * stage_kimg if stage_kimg else None
        self.weighting, self.c, self.teacher_step = weighting, c, teacher_step

    def frozen_networks(self) -> list[Teacher]:
        return [self.teacher] if self.teacher_step else []

    def learned_teachers(self) -> list[Teacher]:
        return self.frozen_networks()

    @property
    def evaluations(self) -> dict[str, float]:
        counts = {"student": 1.0, "student without gradient": 1.0}
        if not self.teacher_step:
            return counts
        return counts | {"teacher": float(TEACHER_STEPS[self.teacher_step] * self.teacher.evaluations_per_estimate)}

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """a, a function of the images seen so far."""
        return int(self.nimg // self.stage_nimg) if self.stage_nimg else 0

    def relative_step(self, t: Tensor) -> Tensor:
        """(t - r) / t in (0, 1] at noise levels t; 1 where r is zero."""
        shrinkage = self.q ** -(self.stage + 1)
        if self.max_ratio is not None:
            shrinkage = max(shrinkage, 1 - self.max_ratio)
        return (shrinkage * (1 + self.k * torch.sigmoid(-self.b * t))).clamp(max=1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, position, labels = batch["image"], batch["position"], batch.get("label")
        (uniform,) = position_uniforms(self.seed, position, TrainingStream.UNIFORMS, 1)
        z = position_noise(self.seed, position, images.shape[1:], TrainingStream.NORMALS)
        # In float64: both sides of the loss are nearly equal. Networks see float32 all the same.
        t = self.levels(uniform, position)
        relative = self.relative_step(t)
        step, r = t * relative, t * (1 - relative)
        x_t = noised(images.double(), t, z)
        masks = SharedMasks()
        with masks:
            output = self.student(x_t, t, labels)
        with torch.no_grad():
            x_r = x_t - per_image(step) * self.direction(x_t, t, r, z, labels)
            estimate = self.estimate(x_r, torch.where(r > 0, r, t), labels, masks)
            target = torch.where(per_image(r > 0), estimate, x_r)
        distance = pseudo_huber((output - target).square().flatten(1).sum(1), self.c)
        weight = 1 / step if self.weighting == "step" else self.student.preconditioning.loss_weight(t)
        loss = self.mean(weight * distance, position).float()
        self.log_mean("loss/student", loss.detach())
        self.log_mean("consistency/distance", distance.detach().mean().float())
        self.log_mean("consistency/relative_step", relative.mean().float())
        self.log_mean("consistency/stage", float(self.stage))
        return loss

    def levels(self, uniform: Tensor, position: Tensor) -> Tensor:
        """The noise levels t (B,), float64, of uniform numbers in (0, 1) and places in the sequence of training samples."""
        return self.noise_levels(uniform).double()

    def estimate(self, x: Tensor, sigma: Tensor, labels: Tensor | None, masks: SharedMasks) -> Tensor:
        """The image that x (B, C, H, W) at levels sigma (B,) is to have the same answer as, with the student's dropout masks."""
        with masks:
            return self.student(x, sigma, labels)

    def mean(self, losses: Tensor, position: Tensor) -> Tensor:
        """The mean of weighted distances (B,)."""
        return losses.mean()

    def direction(self, x_t: Tensor, t: Tensor, r: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """What x changes by from t to r, per unit of noise level: z, or the slope of the teacher's step."""
        return z if self.teacher_step is None else self.step_slope(self.teacher_step, x_t, t, r, labels)

"""MeanFlow: a flow's mean velocity between any two times, by which one step goes all the way (Geng et al., arXiv 2505.13447)."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.components.augmentation import augmented, check_augment, check_unmirrored
from lightning_modules.components.flow_student import FlowStudent
from stillhouse.checks import check_above, check_choice, check_counts, check_fractions
from stillhouse.diffusion.derivatives import DERIVATIVES, derivative, turns_fast
from stillhouse.diffusion.flow import between, level_of, per_sample, time_of, velocity
from stillhouse.diffusion.noise_levels import LogNormal
from stillhouse.diffusion.random_numbers import SharedMasks, TrainingStream, position_noise, position_uniforms
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.second_time import condition_on_second_time

TARGETS = ("teacher", "data")


class MeanFlow(FlowStudent):
    """min_u E |u(X_t, t, r) - u'|^2 / sg(|u(X_t, t, r) - u'|^2 + c)^p with u' = sg(v + (r - t) du/dt), by MeanFlow's identity.

    u(X_t, t, r) is the mean velocity from t to a later time r on the path X_t = (1 - t) X_0 + t X_1 from noise X_0 to images X_1.
    (The paper's times are 1 - t.) It begins as the teacher's velocity, read with the span r - t as one more condition. The
    velocity v is the teacher's (distillation), or X_1 - X_0 (training from data); du/dt is the derivative along v. Noise levels
    are log-normal, ln(sigma) = ln((1 - t) / t) ~ N(p_mean, p_std^2), and that of r likewise; a second level above the first one
    is set to it, and so is a share of all. Both passes have equal dropout masks.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        target: str = "teacher",
        derivative: str | None = None,
        p_mean: float = -0.6,
        p_std: float = 1.6,
        until_mean: float = -4.0,
        until_std: float = 1.6,
        equal_share: float = 0.25,
        p: float = 0.75,
        c: float = 1e-3,
        augment: float | None = None,
        **common,
    ):
        """Args beside those of `Method`.

        Args:
            teacher: The flow, or another denoiser; its network is the student's beginning.
            target: What the velocity v is of, "teacher" or "data".
            derivative: How du/dt is made, "forward" or "finite" (`stillhouse.diffusion.derivatives`); None: forward, but finite
                for a network whose embedding of the noise level turns fast, with differences that do not see its ripples.
            p_mean: Of ln(sigma) at t.
            p_std: Of ln(sigma) at t.
            until_mean: Of ln(sigma) at r.
            until_std: Of ln(sigma) at r.
            equal_share: Of the batch that has r = t, in [0, 1): a regression on v.
            p: Power of the loss's weight; 0: the squared distance itself.
            c: Added to the squared distance in that weight.
            augment: As of `Pretrain`, with target "data".

        Raises:
            ValueError: For options out of range, or a network that takes no second time or no augmentation labels.
        """
        super().__init__(**common)
        check_choice("method.target", target, TARGETS)
        if derivative is not None:
            check_choice("method.derivative", derivative, tuple(DERIVATIVES))
        check_above(0, **{"method.p_std": p_std, "method.until_std": until_std, "method.c": c})
        if not p >= 0:
            raise ValueError(f"method.p must not be negative, got {p!r}")
        check_fractions(**{"method.equal_share": equal_share})
        if augment is not None and target == "teacher":
            raise ValueError(
                "method.augment is for method.target=data: a teacher's velocities are those of plain images"
            )
        check_augment(augment, teacher.denoiser.network)
        self.follow(teacher, label_dropout=False)
        condition_on_second_time(self.student.network)
        self.teacher = teacher if target == "teacher" or teacher.weights else None
        fast = turns_fast(self.student)
        self.target, self.augment = target, augment
        self.derivative = derivative or ("finite" if fast else "forward")
        self.step = 3e-2 if fast else 1e-3  # of the span
        self.levels, self.second_levels = LogNormal(p_mean, p_std), LogNormal(until_mean, until_std)
        self.equal_share, self.p, self.c = equal_share, p, c

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        check_unmirrored(self.augment, data)
        return super().training_data(data)

    def frozen_networks(self) -> list[Any]:
        return [self.sampler] if self.target == "teacher" else []

    def learned_teachers(self) -> list[Teacher]:
        return self.frozen_networks()

    @property
    def evaluations(self) -> dict[str, float]:
        counts = {"student": 1.0, "student's derivative": float(DERIVATIVES[self.derivative])}
        return counts | ({"teacher": float(self.sampler.evaluations_per_estimate)} if self.target == "teacher" else {})

    # -- training --------------------------------------------------------------------------------------------------

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return augmented(batch, self.augment, self.seed)

    def two_times(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """t and r (B,), float64 with start <= t <= r < 1, of places in the sequence of training samples."""
        first, second, third = position_uniforms(self.seed, position, TrainingStream.FLOW_TIMES, 3)
        level = self.levels(first).double().clamp_max(level_of(self.start))
        later = torch.where(third < self.equal_share, level, self.second_levels(second).double())
        return time_of(level), time_of(torch.minimum(level, later))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, position, labels = (
            batch["image"].double(),
            batch["position"],
            (batch.get("label"), batch.get("augment")),
        )
        noise = position_noise(self.seed, position, images.shape[1:], TrainingStream.NORMALS).double()
        t, r = self.two_times(position)
        z = between(noise, images, t)
        masks = SharedMasks()
        with masks:
            u = velocity(self.student, z, t, *labels, until=r)
        with torch.no_grad():
            v = images - noise if self.target == "data" else self.teacher_velocity(z, t, labels[0])
            # (r - t) du/dt in one piece: as z and t move by (r - t) per unit.
            change = derivative(
                lambda z, t: velocity(self.student, z, t, *labels, until=r),
                (z, t),
                (per_sample(r - t, z) * v, r - t),
                self.derivative,
                network=self.student.network,
                masks=masks,
                step=self.step,
                room=(t - self.start) / (r - t).clamp_min(torch.finfo(t.dtype).tiny),  # not to before `start`
            )
        square = (u - (v + change)).square().flatten(1).sum(1)
        loss = (square / (square.detach() + self.c) ** self.p).mean().float()
        self.log_mean("loss/student", loss.detach())
        self.log_mean("mean_flow/square", square.detach().mean().float())
        self.log_mean("mean_flow/change", change.square().flatten(1).sum(1).mean().float())
        return loss

    def teacher_velocity(self, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """v(X_t, t) of the teacher, (B, C, H, W)."""
        return velocity(self.sampler.denoiser, z, t, labels if self.sampler.conditional else None)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        """One jump, or several that are equal in flow time."""
        nfe = 1 if nfe is None else nfe
        check_counts(steps=nfe)
        scale = self.student.preconditioning.prior_std(torch.tensor(level_of(self.start))).item()
        return Sampling(flow_uniform(nfe, self.start).tolist(), scale, "jumps")

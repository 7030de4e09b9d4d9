"""Continuous-time consistency models: a consistency function learns from its own tangent (sCM, Lu & Song, arXiv 2410.11081)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.components.consistency import ConsistencyMethod, per_image
from stillhouse.checks import check_above, check_choice
from stillhouse.diffusion.derivatives import DERIVATIVES, derivative
from stillhouse.diffusion.noise_levels import LogNormal
from stillhouse.diffusion.random_numbers import SharedMasks, TrainingStream, position_noise, position_uniforms
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.trigflow import angle_of, trigflow_output
from stillhouse.networks.log_variance import LogVariance

TARGETS = ("teacher", "data")


class SCM(ConsistencyMethod):
    """min_F E e^-u(t) / sigma |F(x_t, t) - sg(F + g)|^2 + u(t), where g is the normalised tangent of f = cos(t) x_t - sin(t) s F:

        g = -cos^2(t) (s F - v) - r cos(t) sin(t) (x_t + s dF/dt),   g <- g / (|g| + c)

    on TrigFlow's path x_t = cos(t) x0 + sin(t) z, with t = arctan(sigma / s) and ln(sigma) ~ N(p_mean, p_std^2). F, which with
    EDM's preconditioning is minus the network's output, begins as the teacher's. The velocity v = dx_t/dt is the teacher's
    (distillation, sCD) or cos(t) z - sin(t) x0 (training, sCT). dF/dt is the derivative along v; all passes have equal dropout
    masks. r grows from 0 to 1, and u is learned beside F. All norms are root mean squares over a sample's values.
    """

    update_cycle = (("student", "log_variance"),)

    def __init__(
        self,
        teacher: Teacher,
        *,
        target: str = "teacher",
        derivative: str = "forward",
        p_mean: float = -1.0,
        p_std: float = 1.4,
        sigma_data: float = 0.5,
        tangent_warmup_kimg: float = 0.0,
        c: float = 0.1,
        middle: float | Sequence[float] = 0.98,
        **common,
    ):
        """Args beside those of `ConsistencyMethod`.

        Args:
            teacher: As there.
            target: What the velocity v is of, "teacher" (sCD) or "data" (sCT).
            derivative: How dF/dt is made, "forward" or "finite" (`stillhouse.diffusion.derivatives`).
            p_mean: Of ln(sigma).
            p_std: Of ln(sigma).
            sigma_data: s, the standard deviation of the data.
            tangent_warmup_kimg: Thousands of images over which r grows linearly from 0 to 1.
            c: Of the tangent's normalisation.
            middle: As there.

        Raises:
            ValueError: For options out of range.
        """
        super().__init__(teacher, middle=middle, **common)
        check_choice("method.target", target, TARGETS)
        check_choice("method.derivative", derivative, tuple(DERIVATIVES))
        check_above(0, **{"method.p_std": p_std, "method.sigma_data": sigma_data, "method.c": c})
        if not tangent_warmup_kimg >= 0:
            raise ValueError(f"method.tangent_warmup_kimg must not be negative, got {tangent_warmup_kimg!r}")
        self.target, self.derivative = target, derivative
        self.noise_levels = LogNormal(p_mean, p_std)
        self.sigma_data, self.c = sigma_data, c
        self.tangent_nimg = 1000 * tangent_warmup_kimg
        self.log_variance = LogVariance()

    def trained_networks(self) -> dict[str, nn.Module]:
        return {**super().trained_networks(), "log_variance": self.log_variance}

    def frozen_networks(self) -> list[Teacher]:
        return [self.teacher] if self.target == "teacher" else []

    def learned_teachers(self) -> list[Teacher]:
        return self.frozen_networks()

    @property
    def evaluations(self) -> dict[str, float]:
        counts = {"student": 1.0, "student's derivative": float(DERIVATIVES[self.derivative])}
        return counts | ({"teacher": float(self.teacher.evaluations_per_estimate)} if self.target == "teacher" else {})

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def tangent_share(self) -> float:
        """r, a function of the images seen so far."""
        return min(self.nimg / self.tangent_nimg, 1.0) if self.tangent_nimg else 1.0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, position, labels = batch["image"].double(), batch["position"], batch.get("label")
        (uniform,) = position_uniforms(self.seed, position, TrainingStream.UNIFORMS, 1)
        z = self.sigma_data * position_noise(self.seed, position, images.shape[1:], TrainingStream.NORMALS)
        sigma = self.noise_levels(uniform)
        t = angle_of(sigma, self.sigma_data)
        cos, sin = per_image(t.cos()), per_image(t.sin())
        x_t = cos * images + sin * z
        masks = SharedMasks()
        with masks:
            output = trigflow_output(self.student, x_t, t, self.sigma_data, labels)
        with torch.no_grad():
            v = self.velocity(x_t, t, cos * z - sin * images, labels)
            tangent = self.tangent(output, x_t, t, v, labels, masks)
        normalised = tangent / (root_mean_square(tangent) + self.c)
        distance = (output - (output.detach() + normalised)).square().flatten(1).mean(1)
        u = self.log_variance(sigma)
        loss = ((-u).exp() / sigma * distance + u).mean().float()
        self.log_mean("loss/student", loss.detach())
        self.log_mean("scm/tangent", root_mean_square(tangent).mean().float())
        self.log_mean("scm/distance", distance.detach().mean().float())
        self.log_mean("scm/tangent_share", self.tangent_share)
        return loss

    def velocity(self, x_t: Tensor, t: Tensor, conditional: Tensor, labels: Tensor | None) -> Tensor:
        """dx_t/dt (B, C, H, W), given that for the image and the noise of each sample: its mean by the teacher, or itself."""
        if self.target == "data":
            return conditional
        labels = labels if self.teacher.conditional else None
        return self.sigma_data * trigflow_output(self.teacher.denoiser, x_t, t, self.sigma_data, labels)

    def tangent(
        self, output: Tensor, x_t: Tensor, t: Tensor, v: Tensor, labels: Tensor | None, masks: SharedMasks
    ) -> Tensor:
        """g (B, C, H, W) before it is normalised: cos(t) df/dt, but that r is the share of what the derivative has in it."""
        s, cos, sin = self.sigma_data, per_image(t.cos()), per_image(t.sin())
        # cos(t) sin(t) dF/dt in one piece, since it stays bounded: it is the derivative by ln(sigma).
        change = derivative(
            lambda x, t: trigflow_output(self.student, x, t, s, labels),
            (x_t, t),
            (cos * sin * v, t.cos() * t.sin()),
            self.derivative,
            network=self.student.network,
            masks=masks,
        )
        return -(cos**2) * (s * output.detach() - v) - self.tangent_share * (cos * sin * x_t + s * change)


def root_mean_square(values: Tensor) -> Tensor:
    """(B, 1, 1, 1) of values (B, C, H, W)."""
    return per_image(values.square().flatten(1).mean(1).sqrt())

"""Truncated consistency training: a consistency model goes on at large noise alone (TCM, Lee et al., arXiv 2410.14895)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_modules.components.consistency import per_image
from lightning_modules.ect import ECT
from stillhouse.diffusion.noise_levels import TruncatedStudentT
from stillhouse.diffusion.random_numbers import SharedMasks
from stillhouse.diffusion.teacher import Teacher


class TCM(ECT):
    """ECT's loss at noise levels t >= t' alone; below t' the consistency model that the training began with gives the targets:

        w(t, r) d(f(x_t, t), sg f_r(x_r, r)),   f_r = f for r >= t', and the frozen copy of its beginning for r < t'.

    ln t has Student's t distribution, truncated to [ln t', ln sigma_max]; a share of the batch is exactly at t', where the frozen
    copy holds f to what it has learned (the boundary condition). The loss is the mean over the others plus `boundary_weight`
    times the mean over that share. The student is meant for t >= t' and so are its samples.
    """

    takes_consistency_model = True

    def __init__(
        self,
        teacher: Teacher,
        *,
        boundary: float = 1.0,
        boundary_share: float = 0.25,
        boundary_weight: float = 0.1,
        t_mean: float = 0.0,
        t_scale: float = 0.2,
        t_df: float = 0.01,
        middle: float | Sequence[float] = 1.0,
        **options,
    ):
        """Args beside those of `ECT`, which has no `p_mean`, `p_std` and `teacher_step` here.

        Args:
            teacher: The consistency model, frozen; its network is the student's beginning.
            boundary: t'.
            boundary_share: Of the batch that is exactly at t', in (0, 1).
            boundary_weight: Of that share's mean loss.
            t_mean: Location of the distribution of ln t.
            t_scale: Its scale.
            t_df: Its degrees of freedom, the fewer the heavier its tail.
            middle: As of `ECT`, not below t'.

        Raises:
            ValueError: For options out of range, or of ECT's that have no meaning here.
        """
        if others := [name for name in ("p_mean", "p_std", "teacher_step") if name in options]:
            raise ValueError(f"method.{others[0]} is no option of TCM: leave it out")
        highest = teacher.sigmas()[0].item()
        if not 0 < boundary < highest:
            raise ValueError(
                f"method.boundary must lie between 0 and the teacher's highest level {highest:g}, got {boundary!r}"
            )
        if not 0 < boundary_share < 1:
            raise ValueError(f"method.boundary_share must lie between 0 and 1, got {boundary_share!r}")
        if not boundary_weight >= 0:
            raise ValueError(f"method.boundary_weight must not be negative, got {boundary_weight!r}")
        super().__init__(teacher, middle=middle, lowest=boundary, **options)
        self.boundary, self.share, self.boundary_weight = boundary, boundary_share, boundary_weight
        self.noise_levels = TruncatedStudentT(t_mean, t_scale, t_df, boundary, highest)

    def frozen_networks(self) -> list[Teacher]:
        return [self.teacher]

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": 1.0, "student without gradient": 1.0, "teacher": 1.0}

    # -- training --------------------------------------------------------------------------------------------------

    def at_boundary(self, position: Tensor) -> Tensor:
        """Whether samples (B,) stand exactly at t': of any that follow each other in the sequence their share."""
        place = position.double()  # float32 has no fractions of a place from 2^24 on
        return ((place + 1) * self.share).floor() > (place * self.share).floor()

    def levels(self, uniform: Tensor, position: Tensor) -> Tensor:
        return torch.where(self.at_boundary(position), self.boundary, super().levels(uniform, position))

    def estimate(self, x: Tensor, sigma: Tensor, labels: Tensor | None, masks: SharedMasks) -> Tensor:
        live = super().estimate(x, sigma, labels, masks)
        labels = labels if self.teacher.conditional else None
        with masks, in_training(self.teacher.denoiser):
            frozen = self.teacher.denoiser(x, sigma, labels)
        return torch.where(per_image(sigma < self.boundary), frozen, live)

    def mean(self, losses: Tensor, position: Tensor) -> Tensor:
        at_boundary = self.at_boundary(position)
        boundary = torch.where(at_boundary, losses, 0).mean() / self.share
        others = torch.where(at_boundary, 0, losses).mean() / (1 - self.share)
        self.log_mean("loss/boundary", boundary.detach().float())
        self.log_mean("loss/consistency", others.detach().float())
        return others + self.boundary_weight * boundary


@contextmanager
def in_training(denoiser: nn.Module) -> Iterator[None]:
    """A frozen network that drops features within the block, as a student in training does."""
    denoiser.train()
    try:
        yield
    finally:
        denoiser.eval()

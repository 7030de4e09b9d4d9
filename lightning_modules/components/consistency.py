"""What consistency models share: a teacher's step between two noise levels, and samples with noise between the evaluations."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_modules.components.method import Method
from stillhouse.checks import check_counts
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.teacher import Teacher

TEACHER_STEPS = {"euler": 1, "heun": 2}  # evaluations of the teacher


class ConsistencyMethod(Method):
    """Base of methods whose student goes from any noise level to the image in one evaluation, and again from renoised images.

    A method's passes of two states in one step stand in blocks of one `SharedMasks`, so that both drop the same features.

    Attributes:
        highest: The noise level where sampling starts.
        lowest: The one to which the levels of samples of many evaluations go down.
        middle: The levels after the first one of a sample of 1 + len(middle) evaluations.
    """

    def __init__(self, teacher: Teacher, *, middle: float | Sequence[float], lowest: float | None = None, **common):
        """Args beside those of `Method`.

        Args:
            teacher: Its network is the student's beginning; its highest noise level is where sampling starts.
            middle: The noise level of the second of two evaluations of a sample, or the levels of those after the first one,
                descending. Samples of other numbers of evaluations have levels of Karras' spacing (EDM, equation 5).
            lowest: The least level for which the student is meant; None: the least one of the teacher's samples.

        Raises:
            ValueError: For levels in `middle` that do not descend from below the highest one, or go below the lowest.
        """
        super().__init__(**common)
        self.teacher = self.sampler = teacher
        self.student = teacher.student(label_dropout=False).train()
        least, self.highest = teacher.level_range
        self.lowest = least if lowest is None else lowest
        self.middle = check_middle(middle, self.highest, lowest or 0.0)

    # -- the teacher's path ----------------------------------------------------------------------------------------

    def slope(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """dx/dsigma of the teacher's probability-flow ODE (EDM, equation 3)."""
        labels = labels if self.teacher.conditional else None
        return (x - self.teacher.denoiser(x, sigma, labels)) / per_image(sigma)

    def step_slope(self, step: str, x_t: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        """What x changes by per unit of noise level in one step of the teacher from x_t (B, C, H, W) at t (B,) to r (B,).

        Args:
            step: "euler" or "heun"; to r = 0 Heun's step is Euler's, as in EDM's sampler.
            x_t: Where the step begins.
            t: Its noise levels.
            r: The lower levels where it ends.
            labels: Classes (B,), int64, or None.
        """
        slope = self.slope(x_t, t, labels)
        if step == "euler":
            return slope
        inside = per_image(r > 0)
        end = torch.where(inside, x_t - per_image(t - r) * slope, x_t)
        return torch.where(inside, (slope + self.slope(end, torch.where(r > 0, r, t), labels)) / 2, slope)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        nfe = 1 if nfe is None else nfe
        check_counts(steps=nfe)
        lower = self.middle
        if nfe != 1 + len(lower):
            lower = karras_grid(nfe, self.lowest, self.highest)[1:-1].tolist()
        scale = self.student.preconditioning.prior_std(torch.tensor(self.highest)).item()
        return Sampling([self.highest, *lower, 0.0], scale, "renoising")


def check_middle(middle: float | Sequence[float], highest: float, lowest: float) -> list[float]:
    """The levels of `method.middle` as a list.

    Raises:
        ValueError: For levels that do not descend from below the highest one to above zero and not below the lowest.
    """
    levels = [float(level) for level in (middle if isinstance(middle, Sequence) else [middle])]
    if not levels or not all(a > b for a, b in pairwise([highest, *levels, 0.0])) or levels[-1] < lowest:
        raise ValueError(
            f"method.middle must be a noise level between {lowest:g} and {highest:g}, or descending ones, got {middle!r}"
        )
    return levels


def per_image(values: Tensor) -> Tensor:
    """Numbers (B,) in the shape that is multiplied with images, (B, 1, 1, 1)."""
    return values[:, None, None, None]

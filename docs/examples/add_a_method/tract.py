"""TRACT: long steps learned from short ones and the student's own average (Berthelot et al., arXiv 2303.04248)."""

import copy

import torch
from torch import Tensor

from lightning_modules.components.method import Method, check_nfe
from stillhouse.checks import check_counts
from stillhouse.diffusion.losses import noised, regression
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.solvers import euler_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise


class TRACT(Method):
    """One phase of TRACT: the teacher's n steps, in `steps` segments, become one step of the student each.

    From a level t of a segment that ends at s, the teacher makes its next step, to t', and the student's average goes on from
    there to s. The student learns the estimate that leads straight from x_t to where they arrive:

        min E |D(x_t, t) - (x_s - (s/t) x_t) / (1 - s/t)|^2 / 2,    x_s = average(teacher(x_t, t -> t'), t' -> s).

    Args:
        teacher: Its network is the student's beginning, its solver steps are the short ones; steps are DDIM's, which in sigma
            are Euler's.
        steps: Segments, hence the network evaluations of a sample.
        average_decay: Of the student's moving average, per update, in [0, 1).
    """

    def __init__(self, teacher: Teacher, *, steps: int = 2, average_decay: float = 0.5, **common):
        super().__init__(**common)
        check_counts(**{"method.steps": steps})
        levels = teacher.sigmas()
        self.length, rest = divmod(len(levels) - 1, steps)
        if rest or self.length < 2:
            raise ValueError(
                f"method.steps={steps} must divide the teacher's {len(levels) - 1} steps into several each; say teacher.steps=..."
            )
        if not 0 <= average_decay < 1:
            raise ValueError(f"method.average_decay must lie in [0, 1), got {average_decay!r}")
        self.teacher = teacher
        self.student = teacher.student().eval()  # without dropout
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.average_decay = average_decay
        self.register_buffer("sigmas", levels, persistent=False)

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": 1.0, "average": 1.0, "teacher": 1.0}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, labels = batch["image"].double(), batch.get("label")
        noise = TrainingNoise(self.seed, batch["position"], images.shape[1:])
        level = noise.indices(len(self.sigmas) - 1)
        end = (level // self.length + 1) * self.length  # of the level's segment
        t, following, s = (self.sigmas[i] for i in (level, level + 1, end))
        x = noised(images, t, noise.noise)
        target = self.target(x, t, following, s, labels)
        loss = regression(self.student(x, t, labels), target, "l2").mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    @torch.no_grad()
    def target(self, x: Tensor, t: Tensor, following: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """The estimate at x (B, C, H, W) from which one step from t to s arrives where teacher and average do; levels (B,)."""
        known = labels if self.teacher.conditional else None
        t_, following_, s_ = (sigma[:, None, None, None] for sigma in (t, following, s))
        state = euler_step(x, self.teacher.denoiser(x, t, known), t_, following_)
        # Where the teacher's step is the segment's last one, there is no way left: any level but zero may be asked for.
        level = torch.where(following > s, following, t)
        arrived = euler_step(state, self.average(state, level, labels), level[:, None, None, None], s_)
        arrived = torch.where(following_ > s_, arrived, state)
        return (arrived - s_ / t_ * x) / (1 - s_ / t_)

    @torch.no_grad()
    def after_update(self) -> None:
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - self.average_decay)

    def sampling(self, nfe: int | None = None) -> Sampling:
        levels = self.sigmas[:: self.length].tolist()
        check_nfe(nfe, len(levels) - 1)
        return Sampling(levels, self.student.preconditioning.prior_std(self.sigmas[0]).item(), "euler")

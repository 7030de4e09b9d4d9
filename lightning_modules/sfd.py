"""SFD: simple and fast distillation along the teacher's trajectories (Zhou et al., arXiv 2409.19681)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules import DataFree
from lightning_modules.components.branches import BranchedMethod
from lightning_modules.components.method import check_nfe
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.losses import REGRESSIONS, regression
from stillhouse.diffusion.random_numbers import TrainingStream, position_uniforms
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.solvers import SOLVERS, analytic_step, check_solver, euler_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks.step_condition import condition_on_steps, fixed_steps_state, set_steps


class SFD(BranchedMethod):
    """A student whose Euler steps end where the teacher's solver does after `substeps` steps.

    A training step is one batch of trajectories, from noise at the teacher's highest level down to `sigma_min`. In each interval
    of the student's grid

        x' = x + (sigma' - sigma) (x - D_student(x, sigma)) / sigma

    is compared with the teacher's state at sigma', the student is updated, and x', detached, starts the next interval, so that
    it learns to correct its own errors. An image of the budget is one trajectory, as in the released code. It needs no images.
    The learning rate falls to a tenth after half of the training, as released.

    Args:
        teacher: Whose trajectories are learned.
        steps: Intervals with an evaluation, hence the NFE of a sample; or several numbers, of which each batch of
            trajectories draws one and the network is told (SFD-v).
        substeps: Teacher steps in each interval.
        sigma_min: Where trajectories and samples end.
        rho: Of Karras' grid from the teacher's highest level to `sigma_min`; the student's takes every `substeps`-th level.
        afs: Whether an analytic first interval comes before the others, without an evaluation or a loss.
        solver: Of the teacher's trajectories, a name of SOLVERS.
        solver_options: Its options.
        teacher_afs: Whether the teacher's first step is analytic, as it is for a teacher that SFD has made.
        loss: "l1", "l2" (sums over pixels) or "huber" (`regression`).
        common: Of all methods, and of branches.

    Raises:
        ValueError: For a value out of range.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        steps: int | Sequence[int],
        substeps: int = 4,
        sigma_min: float = 0.006,
        rho: float = 7.0,
        afs: bool = True,
        solver: str = "dpm_solver_pp",
        solver_options: Mapping[str, bool | float | None] | None = None,
        teacher_afs: bool = False,
        loss: str = "l1",
        **common,
    ):
        super().__init__(**common)
        choices = steps if isinstance(steps, Sequence) and not isinstance(steps, str) else [steps]
        if not choices:
            raise ValueError("method.steps must be a number of steps, or a list of some")
        for count in choices:
            check_counts(**{"method.steps": count})
        if len(set(choices)) < len(choices):
            raise ValueError(f"method.steps={list(choices)} names a number twice; each is drawn as often as the others")
        check_counts(**{"method.substeps": substeps})
        check_choice("method.loss", loss, REGRESSIONS)
        self.choices = sorted(choices)
        self.solver, self.solver_options = solver, dict(solver_options or {})
        check_solver("method", solver, self.solver_options)
        self.teacher = teacher
        self.student = teacher.student(label_dropout=False).train()  # with the network's dropout, as released
        if len(self.choices) > 1:
            condition_on_steps(self.student.network, self.choices[-1])
        self.widen_student(substeps)
        self.distance = loss
        self.afs, self.teacher_afs = bool(afs), bool(teacher_afs)
        high = teacher.sigmas()[0].item()
        counts = {count: (count + self.afs) * substeps for count in self.choices}
        self.grids = {count: karras_grid(fine, sigma_min, high, rho) for count, fine in counts.items()}
        for count, grid in self.grids.items():  # the same on the device: a copy in each step would wait for it
            self.register_buffer(f"levels{count}", grid.float(), persistent=False)

    @property
    def evaluations(self) -> dict[str, float]:
        """An image is one trajectory; where the student's first step is analytic the teacher still makes it."""
        mean = sum(self.choices) / len(self.choices)
        teacher_steps = (mean + self.afs) * self.substeps - self.teacher_afs
        per_step = SOLVERS[self.solver].evaluations * self.teacher.evaluations_per_estimate
        return {"student": float(mean), "teacher": per_step * teacher_steps}

    @property
    def student_updates(self) -> int:
        return sum(self.steps_of(range(self.trainer.global_step)))

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        return DataFree(self.batch_size)

    def lr_scale(self) -> float:
        return super().lr_scale() * (1.0 if self.progress < 0.5 else 0.1)

    # -- training --------------------------------------------------------------------------------------------------

    def train_on(self, batch: dict[str, Tensor]) -> Tensor:
        """One batch of trajectories, with an update for each interval of the student's grid that has an evaluation."""
        (steps,) = self.steps_of([self.trainer.global_step])
        self.tell(steps)
        noise = TrainingNoise(self.seed, batch["position"], self.image_shape)
        labels = noise.labels(self.teacher.num_classes)
        condition = {} if labels is None else {"label": labels}
        grid = self.grids[steps]
        sigmas = self.get_buffer(f"levels{steps}")
        x = noise.latents.double() * self.teacher.denoiser.preconditioning.prior_std(grid[0]).item()
        path = self.teacher_path(x, grid, labels)
        losses, means = [], []
        for first in range(0, len(grid) - 1, self.substeps):  # of the levels of an interval
            targets = self.next_targets(path)
            if first == 0 and self.afs:
                x = analytic_step(x, grid[0].item(), grid[self.substeps].item())
                continue
            taus = sigmas[first + self.stride : first + self.substeps + 1 : self.stride, None, None, None]
            ends: list[Tensor] = []
            loss = partial(self.interval_loss, sigma=sigmas[first], taus=taus, ends=ends)
            last = first + self.substeps == len(grid) - 1
            losses.append(self.update({"x": x.float(), "target": targets, **condition}, loss, last=last))
            means.append(dict(self.means))
            x = torch.cat(ends)
        self.means = {name: sum(mean[name] for mean in means) / steps for name in self.means}
        return sum(losses) / steps

    def interval_loss(self, batch: dict[str, Tensor], sigma: Tensor, taus: Tensor, ends: list[Tensor]) -> Tensor:
        """The loss of one Euler step from `sigma`, whose end point is added to `ends`.

        Args:
            batch: The states "x" (B, C, H, W) where it starts, the teacher's "target" (B, K, C, H, W), and labels.
            sigma: The level of "x", a scalar.
            taus: The levels of the targets (K, 1, 1, 1), the last one that of the end point.
            ends: The states from which the next interval goes on, of all micro-batches so far.
        """
        x, targets = batch["x"], batch["target"]
        states = euler_step(x[:, None], self.student.branches(x, sigma, batch.get("label")), sigma, taus)
        end = states[:, -1].detach()
        # From an overflow, whose update a loss scale skips, a trajectory goes on where its teacher is.
        finite = end.flatten(1).isfinite().all(1)[:, None, None, None]
        ends.append(torch.where(finite, end, targets[:, -1]))
        loss = self.branch_loss(regression(states, targets, self.distance))
        self.log_mean("loss/student", loss.detach())
        return loss

    def steps_of(self, training_steps: Sequence[int]) -> list[int]:
        """How many steps the trajectories of these training steps have, on all ranks: one of the choices, drawn evenly."""
        if len(self.choices) == 1:
            return self.choices * len(training_steps)
        positions = torch.tensor(training_steps, dtype=torch.int64) * self.batch_size
        (u, *_) = position_uniforms(self.seed, positions, TrainingStream.STEP_COUNT)
        return [self.choices[int(value * len(self.choices))] for value in u.tolist()]

    def teacher_path(self, x: Tensor, grid: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        """The states after each of the teacher's steps; a multistep solver keeps its history over the student's intervals."""
        if self.teacher_afs:
            x = analytic_step(x, grid[0].item(), grid[1].item())
            yield x
            grid = grid[1:]
        yield from SOLVERS[self.solver].solve(self.teacher.denoiser, x, grid, labels, **self.solver_options)

    @torch.no_grad()
    def next_targets(self, path: Iterator[Tensor]) -> Tensor:
        """The teacher's states in the next interval that the branches are compared with, (B, K, C, H, W), float32."""
        states = list(islice(path, self.substeps))
        return torch.stack(states[self.stride - 1 :: self.stride], 1).float()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "under_way" in checkpoint and checkpoint["global_step"] < self.total_steps:
            raise ValueError(
                "this checkpoint was written when a training step was one interval of a trajectory and not a whole one: choose "
                "another name=... to train again"
            )
        super().on_load_checkpoint(checkpoint)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        steps = check_nfe(nfe, *self.choices[::-1])
        sigmas = self.grids[steps][:: self.substeps].tolist()
        scale = self.student.preconditioning.prior_std(torch.tensor(sigmas[0])).item()
        return Sampling(sigmas, scale, analytic_first=self.afs, double=False)

    def sampled_student(self) -> Denoiser:
        self.tell(self.nfe)
        return self.student

    def tell(self, steps: int) -> None:
        """The network, in how many steps it is used."""
        if len(self.choices) > 1:
            set_steps(self.student.network, steps)

    def exported(self) -> dict[str, Tensor]:
        """With several numbers of steps: of the chosen one, at first the largest."""
        if len(self.choices) == 1:
            return super().exported()
        return fixed_steps_state(self.student.network, self.nfe)

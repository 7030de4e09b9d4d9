"""SFD: simple and fast distillation along the teacher's trajectories (Zhou et al., arXiv 2409.19681)."""

from collections.abc import Iterator, Mapping, Sequence
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

    A trajectory starts from noise at the teacher's highest level. In each interval of the student's grid

        x' = x + (sigma' - sigma) (x - D_student(x, sigma)) / sigma

    is compared with the teacher's state at sigma', and x', detached, starts the next interval, so the student learns to
    correct its own errors. One step is one interval of one batch of trajectories; it needs no images.

    steps: intervals with an evaluation, hence the NFE of a sample; or several numbers, of which each batch draws one and the
    network is told (SFD-v). afs: an analytic first interval before them, without an evaluation or a loss. The student's
    grid takes every `substeps`-th level of the teacher's, which is Karras' with `rho` from the highest level to `sigma_min`,
    where samples end too. solver, solver_options: of the teacher's trajectories. teacher_afs: whether their first step is
    analytic, as it is for a teacher that SFD has made. loss: "l1", "l2" (sums over pixels) or
    "huber" (`regression`).
    The learning rate falls to a tenth after half of the training, as released.
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
        self.choices = sorted(choices)
        check_counts(**{"method.substeps": substeps})
        check_choice("method.loss", loss, REGRESSIONS)
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
        # The trajectories under way: when they set out, in how many steps, the student's states and the teacher's to come.
        self.departure, self.steps_under_way = 0, 0
        self.x: Tensor | None = None
        self.path: Iterator[Tensor] | None = None

    @property
    def evaluations(self) -> dict[str, float]:
        """An image is one interval of one trajectory; where the student's first step is analytic the teacher still makes it."""
        per_step = SOLVERS[self.solver].evaluations
        steps = [(count + self.afs) * self.substeps - self.teacher_afs for count in self.choices]
        return {"student": 1.0, "teacher": per_step * sum(steps) / sum(self.choices)}

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        return DataFree(self.batch_size)

    def lr_scale(self) -> float:
        return super().lr_scale() * (1.0 if self.progress < 0.5 else 0.1)

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.tables = {count: grid.float().to(self.device) for count, grid in self.grids.items()}
        if self.x is not None:  # of all ranks, from a checkpoint
            share = self.batch_size // self.trainer.world_size
            self.x = self.x[self.global_rank * share :][:share].to(self.device)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where the student's interval begins and what it is compared with; the teacher goes on with the whole batch."""
        step = self.trainer.global_step
        if step == self.departure + self.steps_under_way:
            self.departure, self.steps_under_way, self.x, self.path = step, self.drawn_steps(step), None, None
        interval = step - self.departure
        random = TrainingNoise(self.seed, batch["position"] - interval * self.batch_size, self.image_shape)
        labels = random.labels(self.teacher.num_classes)
        self.join(random.latents, labels, interval)
        self.ends: list[Tensor] = []
        found = {"x": self.x, "target": self.next_states()}
        return found if labels is None else found | {"label": labels}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        first = (self.trainer.global_step - self.departure + self.afs) * self.substeps
        table = self.tables[self.steps_under_way][first : first + self.substeps + 1]
        sigma, taus = table[0], table[self.stride :: self.stride, None, None, None]
        self.tell(self.steps_under_way)
        states = euler_step(x[:, None], self.student.branches(x, sigma, batch.get("label")), sigma, taus)
        end = states[:, -1].detach()
        # From an overflow, whose step a loss scale skips, a trajectory goes on where its teacher is.
        finite = end.flatten(1).isfinite().all(1)[:, None, None, None]
        self.ends.append(torch.where(finite, end, batch["target"][:, -1]))
        loss = self.branch_loss(regression(states, batch["target"], self.distance))
        self.log_mean("loss/student", loss.detach())
        return loss

    def train_on(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().train_on(batch)
        self.x = torch.cat(self.ends)
        return loss

    def drawn_steps(self, step: int) -> int:
        """Those of the trajectories that set out at this training step, on all ranks."""
        (u, *_) = position_uniforms(self.seed, torch.tensor([step * self.batch_size]), TrainingStream.STEP_COUNT)
        return self.choices[int(u.item() * len(self.choices))]

    def join(self, latents: Tensor, labels: Tensor | None, interval: int) -> None:
        """Sets trajectories out that are at their start, and brings the teacher's along where the run was resumed."""
        if self.path is not None:
            return
        grid = self.grids[self.steps_under_way]
        start = latents.double() * self.teacher.denoiser.preconditioning.prior_std(grid[0]).item()
        if self.x is None:
            first = grid[self.substeps].item()
            self.x = (analytic_step(start, grid[0].item(), first) if self.afs else start).float()
        self.path = self.teacher_path(start, grid, labels)
        for _ in range(interval + self.afs):
            self.next_states()

    def teacher_path(self, x: Tensor, grid: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        """The states after each of the teacher's steps; a multistep solver keeps its history over the student's intervals."""
        if self.teacher_afs:
            x = analytic_step(x, grid[0].item(), grid[1].item())
            yield x
            grid = grid[1:]
        yield from SOLVERS[self.solver].solve(self.teacher.denoiser, x, grid, labels, **self.solver_options)

    @torch.no_grad()
    def next_states(self) -> Tensor:
        """The teacher's states in the next interval that the branches are compared with, (B, K, C, H, W), float32."""
        states = [next(self.path) for _ in range(self.substeps)]
        return torch.stack(states[self.stride - 1 :: self.stride], 1).float()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        x = None if self.x is None else self.all_gather(self.x).reshape(-1, *self.image_shape).cpu()
        checkpoint["under_way"] = {"departure": self.departure, "steps": self.steps_under_way, "x": x}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["under_way"]
        self.departure, self.steps_under_way, self.x = state["departure"], state["steps"], state["x"]

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

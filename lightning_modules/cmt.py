"""Consistency mid-training: from all states of a teacher's trajectories to their ends (CMT, Hu et al., arXiv 2509.24526)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules import TrajectoryDataModule
from datamodules.trajectories import check_store
from lightning_modules.components.consistency import ConsistencyMethod
from stillhouse.checks import check_counts
from stillhouse.diffusion.distance import Distance
from stillhouse.diffusion.schedules import log_snr_uniform
from stillhouse.diffusion.teacher import Teacher


class CMT(ConsistencyMethod):
    """min_f E d(f(x_i, t_i), x_n) over the states x_0, .. x_{n-1} of the teacher's stored trajectories, with their end x_n.

    f begins as the teacher. An image of the budget is one trajectory, whose n states are all evaluated. It is the beginning of
    further training of a consistency model (`method=ect teacher=runs/NAME`), and a student by itself.
    """

    monitor = "heldout/loss"

    def __init__(
        self,
        teacher: Teacher,
        *,
        steps: int = 16,
        solver: str = "dpm_solver_pp",
        solver_options: Mapping[str, bool | float | None] | None = None,
        sigma_min: float = 0.002,
        loss: str = "l2",
        lpips_weights: str | None = None,
        lpips_resize: int | None = None,
        pairs: int,
        held_out: int,
        dtype: str = "float16",
        store: str | Path = "data/trajectories",
        middle: float | Sequence[float] = 0.8,
        **common,
    ):
        """Args beside those of `ConsistencyMethod`.

        Args:
            teacher: As there.
            steps: n, of the solver that makes the trajectories, each from another level of n that are uniform in the log-SNR.
            solver: A name of SOLVERS.
            solver_options: Its options.
            sigma_min: The lowest of the levels; from there the last step goes to the image.
            loss: d, "l2", "l1", "huber" (sums over pixels), "lpips" or "lpips+l2" (`stillhouse.diffusion.distance`).
            lpips_weights: As of `Distance`.
            lpips_resize: As of `Distance`.
            pairs: Stored trajectories to train on.
            held_out: Stored trajectories to choose the checkpoint by.
            dtype: Of stored states, "float16" or "float32".
            store: The folder of all stores.
            middle: As of `ConsistencyMethod`.

        Raises:
            ValueError: For options out of range.
        """
        super().__init__(teacher, middle=middle, **common)
        check_store(store, "the teacher's")
        self.distance = Distance(loss, self.image_shape, lpips_weights, lpips_resize)
        check_counts(**{"method.steps": steps})
        schedule = partial(log_snr_uniform, sigma_min=sigma_min, sigma_max=self.highest)
        self.path = teacher.sampled_by(solver, solver_options, schedule, steps)
        self.register_buffer("levels", self.path.sigmas()[:-1], persistent=False)
        self.start = teacher.denoiser.preconditioning.prior_std(self.levels[0]).item()
        self.stored = {"pairs": pairs, "held_out": held_out, "dtype": dtype, "root": store}

    def frozen_networks(self) -> list[Any]:
        return [self.distance]

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": float(len(self.levels))}

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        keep = range(1, len(self.levels) + 1)
        options = {"batch_size": self.batch_size, "seed": self.seed, "images": data}
        return TrajectoryDataModule(self.path, keep=keep, **options, **self.stored)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.distances(batch).mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    def distances(self, batch: dict[str, Tensor]) -> Tensor:
        """d of all states of the batch's trajectories, (B n,)."""
        states, count = batch["states"], len(self.levels)
        x = torch.cat([self.start * batch["noise"][:, None], states[:, :-1]], 1).flatten(0, 1)
        labels = batch["label"].repeat_interleave(count) if "label" in batch else None
        output = self.student(x, self.levels.float().repeat(len(states)), labels)
        return self.distance(output, states[:, -1].repeat_interleave(count, 0))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log(self.monitor, self.distances(batch).mean(), batch_size=len(batch["noise"]), sync_dist=True)

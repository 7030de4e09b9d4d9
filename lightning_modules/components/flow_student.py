"""What the students of flows share: how they are read, sampled, and trained on their teachers' samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from datamodules import TrajectoryDataModule
from datamodules.trajectories import check_alike, check_store
from lightning_modules.components.method import Method, check_nfe
from stillhouse.diffusion.flow import between, end_state, time_of, velocity
from stillhouse.diffusion.random_numbers import TrainingStream, position_uniforms
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.time_distributions import TimeDistribution


class FlowStudent(Method):
    """A student read as a flow from noise X_0 at t = 0 to images X_1 at t = 1 (`stillhouse/diffusion/flow.py`).

    Its network is read from the time `start` on, where the noise level is its teacher's highest. A sample is the ODE's solution
    by the teacher's solver and schedule or, for another number of evaluations, by so many Euler steps that are uniform in t.

    Attributes:
        sampler: The teacher whose schedule and solver sample the flow.
        start: The time of the highest noise level, in (0, 1).
        euler_steps: The number of steps that the student is distilled for, which takes no other; None: a flow to be solved.
    """

    euler_steps: int | None = None

    def follow(self, teacher: Teacher, label_dropout: bool) -> None:
        """Make the student of a teacher: its network, its schedule and solver."""
        self.sampler = teacher
        self.student = teacher.student(label_dropout).train()
        self.start = time_of(teacher.sigmas()[0].item())

    def sampling(self, nfe: int | None = None) -> Sampling:
        if self.euler_steps is not None:
            nfe = check_nfe(nfe, self.euler_steps)
        elif nfe is None or nfe == self.sampler.sampling().nfe:
            return self.sampler.sampling()
        # The noise is the state at `start`, so that one step leads to X_0 + (1 - start) v(X_0, start). The released code of
        # rectified flow goes by 1 / steps from there on, 1e-3 of the way too far.
        return Sampling(flow_uniform(nfe, self.start).tolist(), 1 / self.start)

    def predict(self, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """f(z, t) = z + (1 - t) v(z, t) of the student, for `end_state`'s arguments but t from 0 on."""
        return end_state(self.student, z, t.clamp_min(self.start), labels)

    def drift(self, z: Tensor, t: Tensor, labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """v(z, t) of the student, for `velocity`'s arguments but t from 0 on."""
        return velocity(self.student, z, t.clamp_min(self.start), labels, augment_labels)

    def straight(
        self, noise: Tensor, images: Tensor, distribution: TimeDistribution, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """v(X_t, t) of the student and X_1 - X_0, which it should be, at X_t = (1 - t) X_0 + t X_1: both (B, C, H, W)."""
        t = self.time(distribution, batch)
        labels = batch.get("label"), batch.get("augment")
        return self.drift(between(noise, images, t), t, *labels), images - noise

    def time(self, distribution: TimeDistribution, batch: dict[str, Tensor], draw: int = 0) -> Tensor:
        """t (B,), float64, of each sample of the batch: a function of (seed, its position, draw) alone; draw is 0, 1, 2 or 3."""
        return distribution(
            position_uniforms(self.seed, batch["position"], TrainingStream.FLOW_TIMES)[draw], self.start
        )


class PairedFlow(FlowStudent):
    """A student of flows that trains on what its teachers make of stored noise.

    Args:
        teachers: The last one is the student's beginning, and the teacher that it is measured beside.
        pairs: Stored samples of each teacher to train on.
        held_out: Stored samples that choose the checkpoint.
        dtype: Of the stored images: "float16", "float32" or "uint8".
        store: The folder of all stored samples.
        common: Of `Method`.

    Raises:
        ValueError: For teachers with unlike images, or a folder that can't be the store.
    """

    monitor = "heldout/loss"

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        pairs: int,
        held_out: int,
        dtype: str = "float16",
        store: str | Path = "data/trajectories",
        **common,
    ):
        super().__init__(**common)
        check_store(store, "the teachers'")
        check_alike(teachers)
        self.teachers = list(teachers)
        self.teacher = self.teachers[-1]
        self.pairs = {"pairs": pairs, "held_out": held_out, "dtype": dtype, "root": store}
        self.follow(self.teacher, label_dropout=False)

    def frozen_networks(self) -> list[Any]:
        """None: its teachers' samples are stored before."""
        return []

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        options = {"batch_size": self.batch_size, "seed": self.seed, "images": data, "through": tuple(self.through)}
        return TrajectoryDataModule(self.teachers, **options, **self.pairs)

    @property
    def through(self) -> Iterable[float]:
        """Noise levels at which states of the teachers are stored before their end points."""
        return ()

    def log_held_out(self, losses: Tensor) -> None:
        """Log the held-out loss, from losses (B,)."""
        self.log(self.monitor, losses.mean(), batch_size=len(losses), sync_dist=True)

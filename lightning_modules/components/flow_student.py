"""What the students of flows share: how they are read, sampled, and trained on their teachers' samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from datamodules import TrajectoryDataModule
from datamodules.trajectories import check_alike, check_store
from lightning_modules.components.method import Method
from stillhouse.diffusion.flow import between, end_state, time_of, velocity
from stillhouse.diffusion.random_numbers import TrainingStream, position_uniforms
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.solvers import euler
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.time_distributions import TimeDistribution


class FlowStudent(Method):
    """A student read as a flow from noise X_0 at t = 0 to images X_1 at t = 1 (`stillhouse/diffusion/flow.py`).

    Its network is read from the time `start` on, where the noise level is its teacher's highest. A sample is the ODE's solution
    by the teacher's solver and schedule or, after `choose_steps`, by so many Euler steps that are uniform in t. A student that
    is `distilled` for its Euler steps takes no other number.
    """

    euler_steps: int | None = None
    distilled = False

    def follow(self, teacher: Teacher, label_dropout: bool) -> None:
        """Make the student of a teacher: its network, its schedule and solver."""
        self.sampler = teacher
        self.student = teacher.student(label_dropout).train()
        self.start = time_of(teacher.sigmas()[0].item())

    @property
    def nfe(self) -> int:
        return self.euler_steps or self.sampler.nfe()

    def distil_into(self, steps: int) -> None:
        self.euler_steps, self.distilled = steps, True

    def choose_steps(self, steps: int, folder: Path) -> str | None:
        if self.distilled:
            return super().choose_steps(steps, folder)
        self.euler_steps = None if steps == self.sampler.nfe() else steps
        return None

    def generate(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        if self.euler_steps is None:
            return self.sampler.sample(noise, labels, denoiser=self.student)
        # The noise is the state at `start`, so that one step leads to X_0 + (1 - start) v(X_0, start). The released code of
        # rectified flow goes by 1 / steps from there on, 1e-3 of the way too far.
        state = noise
        sigmas = flow_uniform(self.euler_steps, self.start)
        for state in euler(self.student, noise.double() / self.start, sigmas, labels):  # noqa: B007
            pass
        return state

    def sampling(self) -> Sampling:
        if self.euler_steps is None:
            return self.sampler.sampling()
        return Sampling(flow_uniform(self.euler_steps, self.start).tolist(), 1 / self.start)

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
        """t (B,), float64, of each sample of the batch: of (seed, its position, draw) alone. draw: 0 .. 3."""
        return distribution(
            position_uniforms(self.seed, batch["position"], TrainingStream.FLOW_TIMES)[draw], self.start
        )


class PairedFlow(FlowStudent):
    """A student of flows that trains on what its teachers make of stored noise.

    teachers: the last one is the student's beginning, and the teacher that it is measured beside. pairs, held_out: numbers of
    stored samples of each; the held-out ones choose the checkpoint. dtype: their storage.
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

"""Denoising Student: regress the teacher's deterministic sampler in one step (Luhman & Luhman, arXiv 2101.02388)."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules import TrajectoryDataModule
from datamodules.trajectories import check_store
from lightning_modules.components.branches import BranchedMethod
from lightning_modules.components.method import check_nfe
from stillhouse.diffusion.losses import REGRESSIONS, regression
from stillhouse.diffusion.sampling import Sampling, one_step_sampling
from stillhouse.diffusion.solvers import euler_step
from stillhouse.diffusion.teacher import Teacher


class DenoisingStudent(BranchedMethod):
    """min_S E |S(z) - T(z)|^2 / 2 over z ~ N(0, I), with T the teacher's ODE solution.

    That is the KL between unit-variance Gaussians around the two images. The student is the teacher's network, evaluated
    once at the highest noise level (an eps network in its residual form). One step is one batch of stored pairs (z, T(z)).

    loss: "l2" as in the paper's equation, "l1" as in its CIFAR-10 code, or "huber" (`regression`). target_noise: standard
    deviation of the noise added to the teacher's images (the paper's device for a finite KL; it leaves the expected L2
    gradient unchanged).
    pairs, held_out: numbers of stored pairs; the held-out ones choose the checkpoint. dtype: their storage.
    """

    monitor = "heldout/loss"

    def __init__(
        self,
        teacher: Teacher,
        *,
        loss: str = "l2",
        target_noise: float = 0.0,
        pairs: int,
        held_out: int,
        dtype: str = "uint8",
        store: str | Path = "data/trajectories",
        **common,
    ):
        super().__init__(**common)
        if loss not in REGRESSIONS:
            raise ValueError(f"method.loss={loss!r} is unknown; choose one of {', '.join(REGRESSIONS)}")
        if target_noise < 0:
            raise ValueError(f"method.target_noise must not be negative, got {target_noise!r}")
        check_store(store, "the teacher's")
        self.teacher = teacher
        self.student = teacher.student().eval()  # no dropout in the student, as released
        self.student.preconditioning = self.student.preconditioning.one_step()
        self.sigmas = teacher.sigmas()
        self.widen_student(len(self.sigmas) - 1)
        # Of the states that are targets. Not a slice, whose odd stride DDP can't broadcast.
        taus = torch.tensor(self.sigmas[self.stride :: self.stride].tolist(), dtype=torch.float64)
        self.register_buffer("taus", taus, persistent=False)
        self.distance, self.target_noise = loss, target_noise
        self.pairs = {"pairs": pairs, "held_out": held_out, "dtype": dtype, "root": store}

    def frozen_networks(self) -> list[Teacher]:
        """None: the teacher's samples are stored before."""
        return []

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        options = {"batch_size": self.batch_size, "seed": self.seed, "images": data}
        keep = range(self.stride, self.substeps + 1, self.stride)
        return TrajectoryDataModule(self.teacher, keep=keep, **options, **self.pairs)

    def start(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) and sigma, a scalar, of the student's one evaluation: at the teacher's highest noise level."""
        sigma = noise.new_full((), self.sigmas[0].item())
        return noise * self.student.preconditioning.prior_std(sigma), sigma

    def sampling(self, nfe: int | None = None) -> Sampling:
        """S(z)."""
        check_nfe(nfe, 1)
        return one_step_sampling(self.student, self.sigmas[0].item())

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        target = batch["states"]
        if self.target_noise:
            target = target + self.target_noise * torch.randn_like(target)
        return {**batch, "states": target}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        # In double precision: from the top of a cosine schedule, 2e4, a step to zero would be rounded to 1e-3.
        x, sigma = self.start(batch["noise"].double())
        estimates = self.student.branches(x, sigma, batch.get("label"))
        states = euler_step(x[:, None], estimates, sigma, self.taus[:, None, None, None])
        loss = self.branch_loss(regression(states, batch["states"], self.distance))
        self.log_mean("loss/student", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = regression(self.sample(batch["noise"], batch.get("label")), batch["states"][:, -1], self.distance).mean()
        self.log(self.monitor, loss, batch_size=len(batch["noise"]), sync_dist=True)

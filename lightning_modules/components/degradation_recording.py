"""Degradation recording, stage 1 of DisBack (Zhang et al., arXiv 2408.15991, algorithm 1)."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules import DataFree
from lightning_modules.components.degradation_path import DegradationPath
from lightning_modules.components.method import Method
from stillhouse.diffusion.losses import denoising_score_matching
from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.sampling import one_step
from stillhouse.diffusion.training_noise import TrainingNoise


class DegradationRecording(Method):
    """Fits a copy of the teacher to the untrained generator by denoising score matching, and keeps nodes on the way.

    The generator is the teacher itself, evaluated once at sigma_init, and stays as it is. `student` is the copy. One step
    is one batch of generated images. Where the path is on disk already nothing is trained.

    Args:
        path: Where its nodes are kept, and of which teacher.
        sigma_init: The noise level at which the generator is evaluated.
        sigmas: Distribution of the noise level in the loss.
        common: Of `Method`.
    """

    averaged_stage = False  # its nodes are kept as they are trained

    def __init__(self, path: DegradationPath, *, sigma_init: float, sigmas: NoiseLevelDistribution, **common):
        super().__init__(**common)
        self.path, self.teacher = path, path.teacher
        self.student = self.teacher.student().eval()
        self.sigma_init, self.sigmas = sigma_init, sigmas

    @property
    def evaluations(self) -> dict[str, float]:
        return {"teacher": 1.0, "copy": 1.0}

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        super().training_data(data)
        return DataFree(self.batch_size)

    def on_train_start(self) -> None:
        # The ranks must agree, even if another run completes the path while they look.
        if self.trainer.strategy.broadcast(self.path.complete()):
            self.trainer.should_stop = True
        else:
            self.training_seconds()  # a missing clock shows now, not at the first node

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        noise = TrainingNoise(self.seed, batch["position"], self.image_shape)
        labels = noise.labels(self.teacher.num_classes)
        with torch.no_grad():
            images = one_step(self.teacher.unguided, noise.latents, self.sigma_init, labels)
        loss = denoising_score_matching(self.student, images, noise.sigma(self.sigmas), noise.noise, labels).mean()
        self.log_mean("loss/degraded", loss.detach())
        return loss

    def after_update(self) -> None:
        """Keeps a node before any checkpoint of its step is written: a kill between the two loses none."""
        step = self.trainer.global_step
        if step in self.path.steps and self.trainer.is_global_zero:
            self.path.save(step, self.student.network, step * self.batch_size, self.training_seconds())

    def on_train_end(self) -> None:
        self.trainer.strategy.barrier()  # rank zero may still be writing the last node
        self.teacher.to("cpu")  # stage 2 has one target on the device, and this need not be it

"""What every method shares. A method is a subclass with a `student`, a `training_loss` and a `generate`."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.components.micro_batches import InParts
from stillhouse.checkpoints.weights import checked_load
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.random_numbers import seed_step
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.compiling import eager


class Method(InParts):
    """A distillation (or training) method.

    Subclasses set `student`, and implement `training_loss(batch)` (see `InParts`) and `generate(noise, labels)`; there is one
    optimiser step per batch. Progress is counted in images seen (`nimg`); random numbers of a step come from
    (seed, rank, step) alone, the learning rate from nimg alone, so a resumed run repeats an uninterrupted one.

    name: used in run names and tables. batch_size: global, over all processes. kimg: budget in thousands of images.
    lr: peak learning rate, reached linearly over the first `warmup_kimg`. weight_decay: decoupled, as in AdamW.
    """

    student: Denoiser
    teacher: Teacher | None = None
    data: pl.LightningDataModule  # the image data set that the run is about, set by `training_data`
    monitor: str | None = None  # a logged metric, smaller is better, by which checkpoints/best.ckpt is chosen

    def __init__(
        self,
        *,
        name: str,
        batch_size: int,
        seed: int,
        kimg: float,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_kimg: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        for option, value in (("kimg", kimg), ("lr", lr), ("batch_size", batch_size)):
            if not value > 0:
                raise ValueError(f"{option} must be a positive number, got {value!r}")
        for option, value in (("warmup_kimg", warmup_kimg), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"method.{option} must not be negative, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"method.betas must be two numbers in [0, 1), got {betas!r}")
        self.name = name
        self.batch_size = batch_size
        self.seed = seed
        self.lr = lr
        self.betas = tuple(betas)
        self.weight_decay = weight_decay
        self.warmup_nimg = 1000 * warmup_kimg
        self.total_steps = math.ceil(1000 * kimg / batch_size)

    @property
    def nimg(self) -> int:
        """Images seen so far, over all processes."""
        return self.trainer.global_step * self.batch_size

    @property
    def progress(self) -> float:
        """The share of the training that lies behind, in [0, 1)."""
        return self.trainer.global_step / self.total_steps

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the student's images."""
        network = self.student.network
        return network.in_channels, network.resolution, network.resolution

    @property
    def student_updates(self) -> int:
        """Optimiser steps of the student so far."""
        return self.trainer.global_step

    @property
    def peak_lrs(self) -> list[float]:
        """The peak learning rate of each optimiser."""
        return [self.lr]

    @property
    def nfe(self) -> int:
        """Network evaluations of one `sample` call."""
        return 1

    @property
    def licence(self) -> str:
        """Of the student's weights: what its teachers allow, or of a student that began without any, Apache-2.0."""
        begun = getattr(self, "sampler", None)  # a teacher's network that was trained on
        teachers = getattr(self, "teachers", [self.teacher]) if self.teacher else [begun]
        found = [teacher.licence for teacher in teachers if teacher is not None and (self.teacher or teacher.weights)]
        return " and ".join(dict.fromkeys(found)) or "Apache-2.0"

    @property
    def evaluations(self) -> dict[str, float]:
        """Network evaluations that an image of the training costs, on average, by the network: what `plan=true` shows."""
        return {"student": 1.0}

    def choose_steps(self, steps: int, folder: Path) -> str | None:
        """From now on `sample` takes so many evaluations; `folder` is the run's, where other students may lie.

        Returns the name of the weights where it took others than those in place, else None. Errors: ValueError for a number
        that the run has no student for.
        """
        if steps != self.nfe:
            raise ValueError(f"steps={steps}: the student of {folder} takes {self.nfe}, and no other number")
        return None

    def exported(self) -> dict[str, Tensor]:
        """The student's state dict as a network of the teacher's kind, which any teacher config can load."""
        return self.student.network.state_dict()

    def stages(self) -> dict[str, "Method"]:
        """What has to be trained before this method, by name and in order; each has a folder of its own in the run's."""
        return {}

    def preparation(self) -> dict[str, float] | None:
        """What the stages cost: {"steps", "images", "seconds"}; None where there are none."""
        return None

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        """What this method trains on, given the run's image data set: the images themselves unless overridden."""
        self.data = data
        return data

    def generate(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def sampling(self) -> Sampling:
        """`generate` in numbers, for a student that leaves this project. Errors: ValueError for a method that has none."""
        raise ValueError(
            f"method {self.name} does not say in numbers how its student is sampled, so it can't be exported"
        )

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), float32 in about [-1, 1], of unit normal noise (B, C, H, W) and labels (B,) or None."""
        training = self.student.training
        self.student.eval()
        try:
            with eager(self.student.network):  # measured alike, compiled or not
                return self.generate(noise, labels).float()
        finally:
            self.student.train(training)

    def limit_gradients(self, norm: float) -> None:
        """Limit the norm of each network's gradient; asked of methods with manual optimisation, where Lightning can't."""
        raise NotImplementedError(f"{type(self).__name__} optimises by hand and has no limit_gradients")

    def adam(self, parameters: Iterable[nn.Parameter], fused: bool = True) -> torch.optim.Optimizer:
        # Lightning can't clip the gradients of a fused optimiser under mixed precision.
        options = {"lr": self.lr, "betas": self.betas, "fused": fused and not self.trainer.gradient_clip_val}
        if self.weight_decay:
            return torch.optim.AdamW(parameters, weight_decay=self.weight_decay, **options)
        return torch.optim.Adam(parameters, **options)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Errors: ValueError, one line, for a checkpoint of other names, shapes or kinds of numbers."""
        file = (self._trainer and self._trainer.ckpt_path) or "the checkpoint"
        with checked_load(file, state_dict, self):
            return super().load_state_dict(state_dict, strict, assign)

    def configure_optimizers(self) -> Any:
        return self.adam(self.student.parameters())

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def lr_scale(self) -> float:
        """This step's learning rate over its peak, a function of the progress alone."""
        return min((self.nimg + self.batch_size) / self.warmup_nimg, 1.0) if self.warmup_nimg else 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.seed, self.global_rank, self.trainer.global_step)
        scale = self.lr_scale()
        for optimizer, peak in zip(self.trainer.optimizers, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale

"""The contract of a method: what a distillation (or training) method is made of. One file, one subclass of `Method`.

    class MyMethod(Method):
        def __init__(self, teacher, *, my_option, **common):
            super().__init__(**common)
            self.teacher = teacher
            self.student = teacher.student()

        def loss(self, batch): ...                # a scalar, the mean over the batch; self.log_mean("loss/student", ...)
        def sampling(self, nfe=None): ...         # how noise becomes images, as plain data

The six concepts, each with a default but for the first two:

- networks: `student` (a `Denoiser`), and what else learns, by name: `trained_networks`, `update_cycle`;
- `loss(batch)`: the mean loss of the networks that this step updates (`self.updating`); `prepare` and `log_mean` beside it;
- `after_update()`: what follows an update at once, before any callback or checkpoint, such as a target network's average;
- `sampling(nfe)`: a `Sampling`; `sample`, quality against the number of network evaluations (NFE) and export follow from it;
- `training_data`: images (the default), a teacher's trajectories, or none;
- `stages`: methods that have to be trained before.

Random numbers of a training sample come from (seed, its position, a named stream), `stillhouse.diffusion.random_numbers`; torch's
global ones are seeded by (seed, rank, step) before each step. So a resumed run repeats an uninterrupted one to the last bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.components.optimisation import Batch, Optimisation
from stillhouse.checkpoints.weights import checked_load
from stillhouse.checks import check_above, check_choice
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.random_numbers import seed_step
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.compiling import eager
from stillhouse.networks.edm2_unet import normalised_layers

OPTIMIZERS = ("adam", "radam")


def check_nfe(nfe: int | None, *possible: int) -> int:
    """The number of network evaluations of a sample: `nfe`, or the first possible one.

    Raises:
        ValueError: For a number that the student is not trained for.
    """
    if nfe is not None and nfe not in possible:
        raise ValueError(f"steps={nfe}: the student takes {', '.join(map(str, possible))}, and no other number")
    return possible[0] if nfe is None else nfe


class Method(Optimisation):
    """Base of all methods. Progress is counted in images seen (`nimg`); one training step is one batch.

    Attributes:
        student: The network that is trained, read as a denoiser.
        teacher: What it is measured beside; None for a method without one.
        sampler: Whose network a method without a teacher begins with, and whose schedule and solver sample it.
        update_cycle: Names of the trained networks that each training step updates, over and over; steps repeat it.
        cycle_start: Steps before the cycle begins, which are updates of the networks that it names first.
        monitor: A logged metric, smaller is better, by which checkpoints/best.ckpt is chosen; None: there is no best.ckpt.
        data: The image data set that the run is about, set by `training_data`.
    """

    student: Denoiser
    teacher: Teacher | None = None
    sampler: Teacher | None = None
    update_cycle: Sequence[tuple[str, ...]] = (("student",),)
    monitor: str | None = None
    data: pl.LightningDataModule
    chosen_nfe: int | None = None  # of `sample`; None: the method's own
    steps_before: int = 0  # training steps of the stages whose sequence of training samples this method goes on with
    takes_consistency_model: bool = (
        False  # whether the teachers that it learns from are consistency models, not denoisers
    )
    _normalised: Sequence[Any] = ()  # layers of magnitude-preserving networks
    averaged_stage: bool = True  # whether callbacks.ema averages its student where it is a stage of another method

    def __init__(
        self,
        *,
        name: str,
        batch_size: int,
        seed: int,
        kimg: float,
        lr: float,
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_kimg: float = 0.0,
        lr_decay_kimg: float | None = None,
        weight_decay: float = 0.0,
    ):
        """The options that all methods have.

        Args:
            name: Used in run names and tables.
            batch_size: Of a training step, over all processes.
            seed: Of the run.
            kimg: Training budget in thousands of images.
            lr: Peak learning rate, reached linearly over the first `warmup_kimg`.
            optimizer: "adam", or "radam": rectified Adam (arXiv 1908.03265), whose first steps need no warm-up.
            betas: Decay rates of the first and second moment.
            warmup_kimg: In thousands of images.
            lr_decay_kimg: Thousands of images after which the learning rate falls as their inverse square root, as EDM2's does
                (arXiv 2312.02696, equation 67); None: it stays.
            weight_decay: Decoupled, as in AdamW.

        Raises:
            ValueError: For a value out of range.
        """
        super().__init__()
        for option, value in (("kimg", kimg), ("lr", lr), ("batch_size", batch_size)):
            if not value > 0:
                raise ValueError(f"{option} must be a positive number, got {value!r}")
        for option, value in (("warmup_kimg", warmup_kimg), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"method.{option} must not be negative, got {value!r}")
        if lr_decay_kimg is not None:
            check_above(0, **{"method.lr_decay_kimg": lr_decay_kimg})
        check_choice("method.optimizer", optimizer, OPTIMIZERS)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"method.betas must be two numbers in [0, 1), got {betas!r}")
        self.name = name
        self.batch_size = batch_size
        self.seed = seed
        self.lr = lr
        self.optimizer = optimizer
        self.betas = tuple(betas)
        self.weight_decay = weight_decay
        self.warmup_nimg = 1000 * warmup_kimg
        self.decay_nimg = 1000 * lr_decay_kimg if lr_decay_kimg else None
        self.total_steps = math.ceil(1000 * kimg / batch_size)

    # -- the networks ----------------------------------------------------------------------------------------------

    def trained_networks(self) -> dict[str, nn.Module]:
        """What learns, by name, the student first; each has an optimiser of its own."""
        return {"student": self.student}

    def frozen_networks(self) -> list[Teacher]:
        """What training steps evaluate and do not train; it is moved to the device.

        In mixed precision a teacher's weights are rounded meanwhile: replace them within its `exact_weights`.
        """
        return [self.teacher] if self.teacher is not None else []

    def learning_rate(self, network: str) -> float:
        """The peak learning rate of a trained network."""
        return self.lr

    def lr_scale(self) -> float:
        """This step's learning rates over their peaks, a function of the progress alone."""
        seen = self.nimg + self.batch_size
        rise = min(seen / self.warmup_nimg, 1.0) if self.warmup_nimg else 1.0
        return rise * max(seen / self.decay_nimg, 1.0) ** -0.5 if self.decay_nimg else rise

    # -- one training step -----------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Batch:
        """Tensors (B, ...) by name: the batch with what its loss needs of the batch as a whole, or of torch's global numbers.

        It is called once for a step; its result may be split into micro-batches.
        """
        return batch

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss, a scalar, of a batch or a micro-batch of it, for the networks that `self.updating` names.

        Args:
            batch: Tensors (B, ...) by name, as `prepare` returns them: of images "image" (float32 in [-1, 1]), "position"
                (int64, the place in the run's sequence of training samples) and, of a conditional data set, "label".
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a loss nor a train_on")

    def after_update(self) -> None:
        """What follows the updates of a training step, before any callback sees the step or a checkpoint holds it."""

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        """How the student makes images of noise in `nfe` network evaluations; None: in the number that it is meant for.

        Raises:
            ValueError: For a number that the student is not trained for.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its student is sampled")

    @property
    def nfe(self) -> int:
        """Network evaluations of one `sample` call."""
        return self.sampling(self.chosen_nfe).nfe

    def choose_steps(self, nfe: int, folder: Path) -> str | None:
        """From now on `sample` takes so many evaluations.

        Args:
            nfe: Network evaluations of a sample.
            folder: The run's, where students for other numbers may lie.

        Returns:
            The name of the weights that are then in place, where they are others than those of the run's checkpoint, else None.

        Raises:
            ValueError: For a number that the run has no student for.
        """
        try:
            self.sampling(nfe)
        except ValueError as error:
            raise ValueError(f"{error} ({folder})") from error
        self.chosen_nfe = nfe
        return None

    def sampled_student(self) -> Denoiser:
        """The student as `sample` evaluates it now."""
        return self.student

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor | None = None, sampling: Sampling | None = None) -> Tensor:
        """Images (B, C, H, W), float32 in about [-1, 1].

        Args:
            noise: Unit normal (B, C, H, W).
            labels: Classes (B,), int64, or None.
            sampling: Another path from noise to images than the method's own.
        """
        training = self.student.training
        self.student.eval()
        try:
            with eager(self.student.network):  # measured alike, compiled or not
                return (sampling or self.sampling(self.chosen_nfe))(self.sampled_student(), noise, labels)
        finally:
            self.student.train(training)

    def exported(self) -> dict[str, Tensor]:
        """The student's state dict as a network of the teacher's kind, which any teacher config can load."""
        return self.student.network.state_dict()

    # -- data and stages -------------------------------------------------------------------------------------------

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        """What this method trains on, given the run's image data set: the images themselves unless overridden."""
        self.data = data
        return data

    def stages(self) -> dict[str, "Method"]:
        """What has to be trained before this method, by name and in order; each has a folder of its own in the run's."""
        return {}

    def preparation(self, folder: Path) -> dict[str, float] | None:
        """What the stages of a run in `folder` cost: {"steps", "images", "seconds"}; None where there are none."""
        return None

    def training_seconds(self) -> float:
        """Seconds of training so far, as callbacks.clock counts them.

        Raises:
            ValueError: Where it is left out.
        """
        clock = next((callback for callback in self.trainer.callbacks if hasattr(callback, "seconds")), None)
        if clock is None:
            raise ValueError(f"method={self.name} counts its seconds: put callbacks.clock back")
        return clock.seconds()

    # -- what callbacks, plans and records ask ---------------------------------------------------------------------

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
    def student_updated(self) -> bool:
        """Whether the latest training step updated the student."""
        return "student" in self.updating

    @property
    def student_updates(self) -> int:
        """Updates of the student so far."""
        return self.student_updates_in(self.trainer.global_step)

    def student_updates_in(self, steps: int) -> int:
        """Updates of the student in so many training steps from the first one on."""
        updated = ["student" in names for names in self.update_cycle]
        before = min(steps, self.cycle_start)
        whole, rest = divmod(steps - before, len(updated))
        return before * updated[0] + whole * sum(updated) + sum(updated[:rest])

    @property
    def evaluations(self) -> dict[str, float]:
        """Network evaluations that an image of the training costs, on average, by the network: what `plan=true` shows."""
        return {"student": 1.0}

    def learned_teachers(self) -> list[Teacher]:
        """The teachers whose samples or scores the student learns from."""
        return [self.teacher] if self.teacher is not None else []

    def end_teacher(self) -> Teacher | None:
        """The teacher whose samples the student learns to make of the same noise; None where they are a mixture of several's."""
        return self.teacher

    def training_curves(self, seeds: Tensor) -> tuple[str, Tensor] | None:
        """The curves from noise to images that the student learns at the end of its training; None where they are no curves.

        Args:
            seeds: Of the noise (N,), int64.

        Returns:
            A title, and Bezier control points (N, n + 1, C, H, W), float64.
        """
        return None

    def stored_bytes(self, network: int) -> dict[str, int]:
        """Bytes that the method keeps in the run's folder beside checkpoints and the student, by what they are for.

        Args:
            network: Bytes of a network of the student's size.
        """
        return {}

    def loss_scale_conflict(self) -> str | None:
        """Why a scaled loss (trainer.precision=16-mixed) would train something else, in words; None where it would not."""
        return None

    @property
    def licence(self) -> str:
        """Of the student's weights: what its teachers allow, or of a student that began without any, Apache-2.0."""
        begun = [self.sampler] if self.sampler is not None and self.sampler.weights else []
        licences = [teacher.licence for teacher in self.learned_teachers() or begun]
        return " and ".join(dict.fromkeys(licences)) or "Apache-2.0"

    # -- Lightning -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        # A fused step would undo the loss scale only after the gradients are limited.
        fused = not (self.gradient_clip and self.scaler)
        return [self.build_optimizer(network.parameters(), fused) for network in self.trained_networks().values()]

    def build_optimizer(self, parameters: Iterable[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
        """The optimiser of one network; fused: in one kernel, where torch has such a form of it."""
        options = {"lr": self.lr, "betas": self.betas}
        if self.optimizer == "radam":
            decay = {"weight_decay": self.weight_decay, "decoupled_weight_decay": True}
            return torch.optim.RAdam(parameters, foreach=True, **decay, **options)
        if self.weight_decay:
            return torch.optim.AdamW(parameters, weight_decay=self.weight_decay, fused=fused, **options)
        return torch.optim.Adam(parameters, fused=fused, **options)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Loads a checkpoint's weights.

        Raises:
            ValueError: In one line, for a checkpoint of other names, shapes or kinds of numbers.
        """
        file = (self._trainer and self._trainer.ckpt_path) or "the checkpoint"
        with checked_load(file, state_dict, self):
            return super().load_state_dict(state_dict, strict, assign)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for network in self.frozen_networks():
            network.to(self.device)
        self._normalised = [
            layer for network in self.trained_networks().values() for layer in normalised_layers(network)
        ]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.seed, self.global_rank, self.trainer.global_step)
        for layer in self._normalised:  # EDM2's forced weight normalisation
            layer.normalise()
        scale = self.lr_scale()
        for optimizer, network in zip(self.trainer.optimizers, self.trained_networks(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(network) * scale

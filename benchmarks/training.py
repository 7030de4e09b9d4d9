"""Seconds per training step of denoising_student, in the framework and bare; samples/s of teacher and student."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.bare_loop import BareLoop
from benchmarks.cases import Case, compose_config, prepare
from benchmarks.measuring import clock, summary
from datamodules import TrajectoryDataModule
from launch.errors import quiet
from lightning_modules import DenoisingStudent
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise

_SHARDS = 8  # of one batch each; a batch draws from all of them
_LOSS_TOLERANCE = 0.01
_SAVES = 3
_STUDENT_CALLS = 5


class LoopTimer(pl.Callback):
    """Times windows of the trainer's steps, each followed by one of the bare loop, from inside one `fit`.

    The first step after a change of loops is not counted: it finds the other one's data in the caches.
    """

    def __init__(self, case: Case):
        self.case = case
        self.framework: list[float] = []
        self.bare: list[float] = []
        self.saves: list[float] = []
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loop = BareLoop(pl_module, trainer.datamodule)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        case, device = self.case, pl_module.device
        self.losses.append(outputs["loss"])
        round_, step = divmod(trainer.global_step - case.warmup, 1 + case.window)
        if round_ == 0 and step == 0:
            self._loop.run(case.warmup)
        elif round_ > 0 and step == 0:
            self.framework.append((clock(device) - self._begun) / case.window)
            self._loop.run(1)
            begun = clock(device)
            self._loop.run(case.window)
            self.bare.append((clock(device) - begun) / case.window)
        elif round_ >= 0 and step == 1:
            self._begun = clock(device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for _ in range(_SAVES):
            begun = clock(pl_module.device)
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            self.saves.append(clock(pl_module.device) - begun)

    def loss_difference(self) -> float:
        """Largest relative difference between the two loops' losses while warming up.

        Raises:
            RuntimeError: Where it shows that they do not compute the same.
        """
        ours, bare = (torch.stack(losses[: self.case.warmup]) for losses in (self.losses, self._loop.losses))
        largest = ((ours - bare).abs() / bare).max().item()
        if not largest <= _LOSS_TOLERANCE:
            raise RuntimeError(
                f"the bare loop and the framework differ by {largest:.1%} in their losses: benchmarks/bare_loop.py no "
                "longer computes what denoising_student does"
            )
        return largest


def measure(case: Case) -> dict[str, Any]:
    """All figures of a case; needs a temporary folder of a few checkpoints' size, and leaves nothing."""
    quiet()
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = compose_config(case, folder, f"method.store={folder}/pairs")
        checkpoint_every = cfg.callbacks.checkpoints.every_n_steps
        timer = LoopTimer(case)
        method, trainer = prepare(cfg, case.warmup + case.rounds * (1 + case.window), timer)
        trainer.fit(method, _pairs(method, case))
        loss_difference = timer.loss_difference()
        sampling = sampling_rates(method, trainer.strategy.root_device, case.sampling_rounds)

    framework, bare, saves = summary(timer.framework), summary(timer.bare), summary(timer.saves)
    pair_steps = case.pair_steps or method.teacher.steps
    return {
        "title": case.title,
        "device": str(trainer.strategy.root_device),
        "precision": trainer.precision,
        "batch_size": method.batch_size,
        "parameters": sum(p.numel() for p in method.student.parameters()),
        "teacher_weights": method.teacher.weights or "random",
        "pairs": f"from {pair_steps} {method.teacher.solver} steps" if pair_steps > 1 else "from 1 Euler step",
        "window_steps": case.window,
        "log_every_n_steps": trainer.log_every_n_steps,
        "seconds_per_step": framework,
        "bare_seconds_per_step": bare,
        "overhead": summary([a / b - 1 for a, b in zip(timer.framework, timer.bare, strict=True)]),
        "loss_difference": loss_difference,
        "checkpoint_seconds": saves,
        "checkpoint_every_n_steps": checkpoint_every,
        "checkpoint_share_of_step": saves["median"] / checkpoint_every / framework["median"],
        **sampling,
    }


def _pairs(method: DenoisingStudent, case: Case) -> TrajectoryDataModule:
    """As `method.training_data`, but few pairs in small shards."""
    size = method.batch_size
    options = {**method.pairs, "pairs": _SHARDS * size, "held_out": size}
    return TrajectoryDataModule(
        method.teacher, batch_size=size, seed=method.seed, steps=case.pair_steps, shard_size=size, **options
    )


def sampling_rates(method: DenoisingStudent, device: torch.device, rounds: int) -> dict[str, Any]:
    """Samples/s of teacher and student, measured alternately, in batches of the training batch size."""
    teacher, size = method.teacher.to(device), method.batch_size
    method.to(device)
    seeds = torch.arange(size, device=device)
    noise = sample_noise(seeds, (teacher.channels, teacher.resolution, teacher.resolution))
    labels = sample_labels(seeds, teacher.num_classes)
    teacher.sample(noise, labels, steps=1), method.sample(noise, labels)
    rates: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(rounds):
        for name, sample, calls in (("teacher", teacher.sample, 1), ("student", method.sample, _STUDENT_CALLS)):
            begun = clock(device)
            for _ in range(calls):
                sample(noise, labels)
            rates[name].append(calls * size / (clock(device) - begun))
    return {
        "teacher_solver": f"{teacher.solver_name}, {teacher.steps} steps",
        "teacher_nfe": teacher.nfe(),
        "student_nfe": method.nfe,
        "teacher_samples_per_second": summary(rates["teacher"]),
        "student_samples_per_second": summary(rates["student"]),
        "speed_up": summary([s / t for s, t in zip(rates["student"], rates["teacher"], strict=True)]),
    }

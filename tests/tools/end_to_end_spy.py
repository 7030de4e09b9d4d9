"""Callbacks that a config can name, for what happens only inside of the processes of a run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from stillhouse.checkpoints.weights import hash_state


class Fails(pl.Callback):
    """Fails in training, in "both" processes, in the "second" alone, or in "none"."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.where == "both" or (self.where == "second" and trainer.global_rank == 1):
            raise ValueError(f"failed in {self.where}")


class Spy(pl.Callback):
    """Leaves, per process, the noise levels that the student's network saw in each step, and its final weights' hash."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.steps: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.student.network.register_forward_pre_hook(self._see, with_kwargs=False)

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self.steps.append(args[1].tolist())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seen = {"pid": os.getpid(), "steps": self.steps, "hash": hash_state(pl_module.student)}
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(seen))


class Preempted(pl.Callback):
    """Under submitit: the signal that takes a machine away, to the first process at `at_step`, once in the life of the run."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sent = Path(trainer.default_root_dir) / "preempted"
        due = "SUBMITIT_EXECUTOR" in os.environ and trainer.is_global_zero and trainer.global_step == self.at_step
        if due and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), signal.SIGUSR2)

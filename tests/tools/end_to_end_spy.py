"""Callbacks that a config can name, for what happens only inside of the processes of a run."""

import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class Fails(pl.Callback):
    """Fails in training, in "both" processes, in the "second" alone, or in "none"."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.where == "both" or (self.where == "second" and trainer.global_rank == 1):
            raise ValueError(f"failed in {self.where}")


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

"""On a signal, such as a cluster sends before it takes the machine away, training saves at the end of the step and ends."""

import signal
from typing import Any

import pytorch_lightning as pl

from callbacks.checkpoint import Checkpoints
from launch.signals import NOTICE, SIGNALS, Stopped


class Requeue(pl.Callback):
    """Ends training after a signal on any rank, once a checkpoint of the step under way is written.

    The signals are those of launch/signals.py. A single process looks for one after each step; several processes tell each
    other every `every_n_steps` steps, over the CPU. Validation is left at once, since the step before it is saved.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Requeue: every_n_steps must be at least 1, got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self._ending = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        NOTICE.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            self._ending = NOTICE.given is not None
        elif trainer.global_step % self.every_n_steps == 0:
            self._ending = _share_signal(trainer)
        if self._ending:
            for checkpoints in _checkpoints(trainer):
                checkpoints.save_this_step()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _checkpoints(trainer):
            NOTICE.training = False
            NOTICE.end_if_given()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        NOTICE.training = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ending:
            signal.alarm(0)
            kept = "saved" if _checkpoints(trainer) else "without callbacks.checkpoints nothing is saved,"
            raise Stopped(f"{kept} after step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            _share_signal(trainer)
        NOTICE.training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        NOTICE.training = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        NOTICE.end_if_given()


def _share_signal(trainer: pl.Trainer) -> bool:
    """Let every rank know of the signal that any rank had received, and return whether there was one.

    One that comes while the ranks ask each other is kept for the next time: the others do not know of it.
    """
    given = trainer.strategy.on_any_rank([NOTICE.given == number for number in SIGNALS])
    shared = next((number for number, on_any in zip(SIGNALS, given, strict=True) if on_any), None)
    NOTICE.given = shared or NOTICE.given
    return shared is not None


def _checkpoints(trainer: pl.Trainer) -> list[Checkpoints]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]

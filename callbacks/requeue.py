"""SIGUSR1, which SLURM sends before a job's time is up: a run saves at the end of the step and ends, to be taken up again."""

import os
import signal
import threading
from typing import Any

import pytorch_lightning as pl

from callbacks.checkpoint import Checkpoints

PATIENCE = 90  # seconds until a checkpoint must be written, of the 120 that examples/slurm.sh gives; else an older one has to do


class Requeued(BaseException):
    """The run ends here because of SIGUSR1. No Exception: nothing on the way may take it for a failure and go on."""


class Notice:
    """Whether this process was given notice by SIGUSR1, and what it may do at once.

    In training the process waits for the end of the step (of several ranks: the next at which they ask each other), but no
    longer than PATIENCE. Elsewhere (teacher's samples, final evaluation) all that is worth keeping is on disk, and whoever
    `decides`, rank zero, ends at once; the others follow.
    """

    def __init__(self) -> None:
        self.given = self.decides = self.training = False
        self._process = 0
        self._before: Any = None

    def heed(self, decides: bool) -> None:
        """From now on the signal gives notice. Only the main thread can take it.

        Errors: Requeued where notice was given since the last `end`.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._give)
            self._before = signal.signal(signal.SIGALRM, self._lose_patience)
        self.decides, self.training, self._process = decides, False, os.getpid()
        self.end_if_given()

    def end(self) -> None:
        """From now on a notice is only taken down, for the next job of a sweep."""
        self.decides = False
        if self._before is not None:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, self._before)
            self._before = None

    def end_if_given(self) -> None:
        if self.given and self.decides and not self.training:
            raise Requeued("all that was done is kept")

    def _give(self, *_: Any) -> None:
        if self.given or os.getpid() != self._process:  # a data loader's worker has inherited this
            return
        self.given = True
        if self.decides:
            signal.alarm(PATIENCE)
            self.end_if_given()

    def _lose_patience(self, *_: Any) -> None:
        if os.getpid() == self._process:
            signal.alarm(PATIENCE)  # should something on the way swallow this one
            raise Requeued(f"in a step of more than {PATIENCE} s, whose work is lost")


NOTICE = Notice()


class Requeue(pl.Callback):
    """Ends a training that was given notice, on any rank, after a checkpoint of the step that was under way.

    A single process looks after each step. Several ask each other every `every_n_steps` steps, host to host.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"Requeue: every_n_steps must be an integer of at least 1, got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self._ends = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        NOTICE.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            self._ends = NOTICE.given
        elif trainer.global_step % self.every_n_steps == 0:
            (self._ends,) = trainer.strategy.on_any_rank([NOTICE.given])
        if self._ends:
            for checkpoints in _checkpoints(trainer):
                checkpoints.save_this_step()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ends:  # a validation that was due has been made, and the checkpoint written
            signal.alarm(0)
            kept = "saved" if _checkpoints(trainer) else "without callbacks.checkpoints nothing is saved,"
            raise Requeued(f"{kept} after step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            (NOTICE.given,) = trainer.strategy.on_any_rank([NOTICE.given])
        NOTICE.training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        NOTICE.training = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        NOTICE.end_if_given()


def _checkpoints(trainer: pl.Trainer) -> list[Checkpoints]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]

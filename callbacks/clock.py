"""Seconds of training: by them methods are compared whose steps cost different amounts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch


class Clock(pl.Callback):
    """Counts the seconds of training over all starts of a run, without validation and without what callbacks measure.

    A GPU is waited for only where the clock is read or stopped, not at each step.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None
        self._device = torch.device("cpu")

    @staticmethod
    def find(trainer: pl.Trainer) -> "Clock | None":
        """The trainer's clock, or None where it has none."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, Clock)), None)

    def seconds(self) -> float:
        """Seconds so far."""
        if self._since is None:
            return self._total
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._total + time.perf_counter() - self._since

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> None:
        self._total, self._since = self.seconds(), None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count the time of the block."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = pl_module.device
        self._start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._total = state_dict["seconds"]

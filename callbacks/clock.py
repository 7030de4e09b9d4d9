"""How long a run has trained: the currency in which methods of unlike cost per step are compared."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch


class Clock(pl.Callback):
    """Seconds of training, over all starts of the run, without validation and what callbacks do `aside`.

    On a GPU the device is waited for where the clock is read or stopped, not at each step.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None
        self._device = torch.device("cpu")

    @staticmethod
    def find(trainer: pl.Trainer) -> "Clock | None":
        return next((callback for callback in trainer.callbacks if isinstance(callback, Clock)), None)

    def seconds(self) -> float:
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

"""Progress of the training: a bar on a terminal, one line per interval in a log file."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from callbacks.components.intervals import check_every_kimg, interval_reached


class Progress(pl.Callback):
    """Shows progress in images on standard error of rank zero, in place of Lightning's bar.

    On a terminal: a bar with images/s and the time left. Elsewhere one line every `every_kimg` thousand images or, if that
    is None, every `every_seconds`: step, kimg done and in total, images/s since the line before, losses, time left; first of
    all, in a stage of a method, the stage's name.
    Also logs speed/images_per_second, since the row before, and with several processes speed/bytes_reduced: what each
    process gave to all-reduce per step (`launch/run/strategies.py`), and says it once.
    """

    def __init__(self, every_kimg: float | None = None, every_seconds: float = 10.0, stage: str = "") -> None:
        if every_kimg is not None:
            check_every_kimg("Progress", every_kimg)
        if every_seconds < 0:
            raise ValueError(f"Progress: every_seconds must not be negative, got {every_seconds}")
        self.every_kimg, self.every_seconds, self.stage = every_kimg, every_seconds, stage
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
        self._total = steps and steps * pl_module.batch_size
        self._start = self._line = self._row = (time.monotonic(), pl_module.nimg)
        self._sent: int | None = getattr(trainer.strategy, "bytes_reduced", None)
        self._said = False
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=pl_module.nimg,
                desc=self.stage or None,
                unit="img",
                unit_scale=True,
                mininterval=0.5,
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = (time.monotonic(), pl_module.nimg)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("speed/images_per_second", _rate(self._row, now), rank_zero_only=True)
            self._log_traffic(trainer, pl_module, (now[1] - self._row[1]) // pl_module.batch_size)
            self._row = now
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.update(pl_module.batch_size)
        late = self.every_kimg is None and now[0] - self._line[0] >= self.every_seconds
        if late or interval_reached(trainer, pl_module, self.every_kimg):
            self._show(trainer, now)
            self._line = now

    def _log_traffic(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> None:
        if self._sent is None or not steps:
            return
        sent = trainer.strategy.bytes_reduced
        each, self._sent = (sent - self._sent) / steps, sent
        pl_module.log("speed/bytes_reduced", each, rank_zero_only=True)
        if trainer.is_global_zero and not self._said:
            text = (
                f"{trainer.world_size} processes | each gives {each / 1e6:.4g} MB of gradients to all-reduce in a step"
            )
            tqdm.write(text, file=sys.stderr)
            self._said = True

    def _show(self, trainer: pl.Trainer, now: tuple[float, int]) -> None:
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k == "loss" or k.startswith("loss/")}
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in losses.items()}, refresh=False)
            return
        done, rate = now[1], _rate(self._start, now)
        left = f"{tqdm.format_interval((self._total - done) / rate)} left" if self._total and rate else ""
        total = f"/{self._total / 1000:.1f}" if self._total else ""
        fields = [
            self.stage,
            f"step {trainer.global_step}",
            f"{done / 1000:.1f}{total} kimg",
            f"{_rate(self._line, now):.0f} img/s",
            *[f"{k} {v:.4g}" for k, v in losses.items()],
            left,
        ]
        print(" | ".join(filter(None, fields)), file=sys.stderr, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _rate(before: tuple[float, int], now: tuple[float, int]) -> float:
    """Images per second between two (seconds, images) marks."""
    return (now[1] - before[1]) / max(now[0] - before[0], 1e-9)

"""Warnings of two failures of score distillation that its losses do not show."""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

_NEWEST = 0.2  # the share of the newest value in a running mean
_FIRST_READINGS = 10  # no warning before


class ScoreHealth(pl.Callback):
    """Reads the logged score/lead and generator/std every `log_every_n_steps` steps, and warns once until a failure is over.

    The fake score lags where a running mean of score/lead is below `-lag`: the target fits the generator's images better than
    the network that is trained on them. The generator collapses where generator/std, the spread of a pixel over the batch, is
    below `collapse` times its largest value so far.
    """

    def __init__(self, lag: float = 0.02, collapse: float = 0.2) -> None:
        if not 0 <= lag < 1 or not 0 < collapse < 1:
            raise ValueError(f"ScoreHealth: need 0 <= lag < 1 and 0 < collapse < 1, got {lag} and {collapse}")
        self.lag, self.collapse = lag, collapse
        self._lead, self._widest, self._readings = 0.0, 0.0, 0
        self._warned: set[str] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logged = trainer.callback_metrics
        if trainer.global_step % trainer.log_every_n_steps or "score/lead" not in logged:
            return
        lead, spread = float(logged["score/lead"]), float(logged["generator/std"])
        if not math.isfinite(lead) or not math.isfinite(spread):  # of a step that a loss scale skipped
            return
        self._lead += _NEWEST * (lead - self._lead)
        self._widest = max(self._widest, spread)
        self._readings += 1
        where = f"at step {trainer.global_step}"
        self._warn(
            "lag",
            self._lead < -self.lag,
            f"the fake score lags behind the generator {where}: it fits the generator's images {-self._lead:.1%} worse than "
            "the target does; raise method.fake_updates or method.fake_lr_factor, or lower method.lr",
        )
        self._warn(
            "collapse",
            spread < self.collapse * self._widest,
            f"the generator collapses {where}: its images spread by {spread:.3g} per pixel, {self._widest:.3g} before; "
            "lower method.lr or raise method.fake_updates",
        )

    def _warn(self, failure: str, present: bool, text: str) -> None:
        if not present:
            self._warned.discard(failure)
        elif failure not in self._warned and self._readings >= _FIRST_READINGS:
            self._warned.add(failure)
            rank_zero_warn(text)

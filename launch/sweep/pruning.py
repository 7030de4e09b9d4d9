"""A trial of a search, inside its job: each measurement of its curve is reported, and a hopeless run is given up."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from callbacks import GenerativeMetrics
from callbacks.components.intervals import interval_reached, is_last_step
from launch.run.folder import RunFolder
from launch.sweep.study import Settings, open_study
from stillhouse.analysis.curves import curve_column_names
from stillhouse.files import write_file
from stillhouse.ranks import run_on_rank_zero


class Pruned(Exception):
    """The run ends here, as by a kill: by hand it goes on from its last checkpoint."""


class Pruning(pl.Callback):
    """Reports to trial `number` of the study in `folder`; raises `Pruned` on every rank where that says so.

    Must come after GenerativeMetrics and before the checkpoints. Leaves pruned.json in the run folder.
    """

    def __init__(self, run: RunFolder, folder: Path, number: int, settings: Settings) -> None:
        self.run, self.folder, self.number, self.settings = run, folder, number, settings

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.every_kimg = next(c.every_kimg for c in trainer.callbacks if isinstance(c, GenerativeMetrics))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not interval_reached(trainer, pl_module, self.every_kimg):
            return
        column, *_ = curve_column_names(trainer.callback_metrics)
        value, nimg = float(trainer.callback_metrics[column]), pl_module.nimg
        total = trainer.max_steps * pl_module.batch_size
        if run_on_rank_zero(lambda: self._hopeless(value, nimg, total)) and not is_last_step(trainer):
            if trainer.is_global_zero:
                note = {"nimg": nimg, column: value, "trial": self.number}
                write_file(self.run.pruned, (json.dumps(note, indent=1) + "\n").encode())
            raise Pruned(f"pruned after {nimg / 1000:g} of {total / 1000:g} kimg, at {column} {value:.4g}")

    def _hopeless(self, value: float, nimg: int, total: int) -> bool:
        from optuna.trial import Trial

        study = open_study(self.folder, self.settings.pruner_for(total))
        stored = study.get_trials()[self.number]
        trial = Trial(study, stored._trial_id)
        if nimg not in stored.intermediate_values:  # a resumed run measures again
            trial.report(value, nimg)
        return trial.should_prune()


def watch(trainer: pl.Trainer, run: RunFolder, hydra_config: DictConfig) -> None:
    """Let the study of the search that this job is a trial of look on."""
    sweeper = hydra_config.sweeper
    settings = Settings(**{key: sweeper[key] for key in Settings.__dataclass_fields__})
    pruning = Pruning(run, Path(hydra_config.sweep.dir), sweeper.trial, settings)
    last = next(
        i for i, c in enumerate([*trainer.callbacks, None]) if c is None or isinstance(c, pl.callbacks.Checkpoint)
    )
    trainer.callbacks.insert(last, pruning)


def trial(hydra_config: DictConfig) -> int | None:
    """The number of the trial that this job is; None outside of a search, also for a trial's run that is trained by hand."""
    return hydra_config.sweeper.get("trial")

"""Checkpoints that survive a kill at any moment: checkpoints/last.ckpt every n steps, checkpoints/best.ckpt by a metric."""

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.evaluation_loop import RestartStage
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from callbacks.components.intervals import is_last_step
from callbacks.loggers.csv_logger import CSVLogger
from stillhouse.checkpoints.bounds import check_archive, check_tensors
from stillhouse.files import atomic_write

_RESUMED = {"callbacks", "global_step", "loops", "optimizer_states"}  # what Lightning needs beside the weights


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The content of a checkpoint.

    Args:
        path: the file.
        map_location: the device of the tensors, as torch.load takes it.
        weights_only: whether objects other than tensors and plain values are refused.

    Raises:
        FileNotFoundError: without the file.
        ValueError: for a file that is truncated, changed on disk, holds foreign objects or no weights.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    instead = "to take last.ckpt" if path.name == "best.ckpt" else "to start again from the beginning"
    way_out = f"put an older copy back, or remove {path.name} {instead}"
    with path.open("rb") as file:
        try:
            check_archive(path)
            # torch.load does not look at the checksums and would return damaged weights.
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:  # a damaged zip file raises half a dozen of them
            damaged = str(error) or type(error).__name__
    if damaged:
        raise ValueError(f"the checkpoint {path} is damaged or cut short ({damaged}): {way_out}")
    try:
        content = check_tensors(torch.load(path, map_location=map_location, weights_only=weights_only), path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the checkpoint {path} holds objects other than tensors and plain values, which are not loaded: {way_out}"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read ({' '.join(str(error).split())}): {way_out}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"the checkpoint {path} has no state_dict: {way_out}")
    return content


def check_owner(path: str | Path, content: Mapping[str, Any], owner: Mapping[str, str]) -> None:
    """Refuse another run's checkpoint; one from before checkpoints named their run is accepted.

    Raises:
        ValueError: for a checkpoint of another method or configuration than `owner` says.
    """
    stored = content.get("run", owner)
    stored = stored if isinstance(stored, dict) else {}
    for key, what in (("method", "method"), ("config", "configuration")):
        if stored.get(key) != owner[key]:
            raise ValueError(
                f"the checkpoint {path} is of another {what} ({stored.get(key)}, and this run's is {owner[key]}): "
                f"put the run's own {Path(path).name} back, or remove this one"
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that the old one or the new one is complete on disk, whenever the process or machine stops.

    Lightning's own class writes a copy to the system's temporary folder and moves it: on another file system that is a plain
    copy over the old checkpoint.
    """

    def __init__(self, owner: Mapping[str, str] | None = None) -> None:
        """Say whose checkpoints these are.

        Args:
            owner: what `launch.run.folder.identity` says of the run. It is kept in checkpoints, and another run's is refused.
        """
        super().__init__()
        self.owner = None if owner is None else dict(owner)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if self.owner is not None:
            checkpoint = checkpoint | {"run": self.owner}
        try:
            with atomic_write(path, sync=True) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch hides a failed write behind an internal assertion of its zip writer.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            state = "the previous one is intact" if path.exists() else "there is no earlier one"
            raise OSError(
                cause.errno, f"cannot write the checkpoint {path}: {cause.strerror}; {state}. Make room and run again"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = read_checkpoint(path, map_location or "cpu", weights_only is not False)
        if missing := _RESUMED.difference(content):
            raise ValueError(
                f"the checkpoint {path} can't be resumed, it lacks {', '.join(sorted(missing))}: "
                f"put an older copy back, or remove {Path(path).name} to start again from the beginning"
            )
        if self.owner is not None:
            check_owner(path, content, self.owner)
        return content


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes <run folder>/checkpoints/last.ckpt and, after validations that improve `pl_module.monitor`, best.ckpt.

    `monitor` names a logged metric, smaller is better; None: no best.ckpt. last.ckpt is written every `every_n_steps`
    optimiser steps, before each validation and at the end of training. A checkpoint written before a validation says so, and
    a run resumed from it begins with that validation: no step is lost, however long it takes. Lightning's ModelCheckpoint
    writes nothing at the end if it has saved before, and omits an interrupted validation.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Checkpoints: every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.best: float | None = None
        self._saved_step = -1
        self._save_requested = False
        self._validation_due = False  # whether the validation of this step is still to be made
        self._max_steps: int | None = None  # the trainer's, where it had to be put up

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        done, total, size = checkpoint["global_step"], trainer.max_steps, pl_module.batch_size
        if trainer.is_global_zero:
            images = f"{done * size:,} of {total * size:,} images"
            print(f"{trainer.default_root_dir} goes on from step {done:,} of {total:,} ({images})", flush=True)
        stored = checkpoint["callbacks"].get(type(self).__name__, {})
        if stored.get("due") and checkpoint["global_step"] == trainer.max_steps:
            # Else Lightning would leave the loop out, and the last validation with it.
            self._max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, trainer.max_steps + 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        if self._validation_due:
            # Where Lightning finishes the batch after which it was interrupted, and counts it in the end; the whole validation.
            loop = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped -= 1
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            loop.val_loop.restarting = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._validation_due = _validation_follows(trainer)
        if (
            self._validation_due
            or is_last_step(trainer)
            or self._save_requested
            or trainer.global_step % self.every_n_steps == 0
        ):
            self._save_requested = False
            _log_in_file(trainer)
            self._save_last(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validation_due = False
        if pl_module.monitor is not None:
            self._save_best(trainer, pl_module.monitor)
        if is_last_step(trainer):
            self._saved_step = -1  # it says that this validation is still to be made
            self._save_last(trainer)

    def save_this_step(self) -> None:
        """Save the step that is just ending; for callbacks that come before this one."""
        self._save_requested = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.folder(trainer) / "last.ckpt")
            self._saved_step = trainer.global_step

    def _save_best(self, trainer: pl.Trainer, monitor: str) -> None:
        if monitor not in trainer.callback_metrics:
            raise ValueError(
                f"Checkpoints: {monitor!r} was not logged in validation; there is {[*trainer.callback_metrics]}"
            )
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[monitor]))
        # NaN is never better, and as the first value it must not become the one to beat.
        if not math.isnan(value) and (self.best is None or value < self.best) and not trainer.fast_dev_run:
            self.best = value
            trainer.save_checkpoint(self.folder(trainer) / "best.ckpt")

    @staticmethod
    def folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self._validation_due = state_dict.get("due", False)  # of runs from before it was saved, after the validation


def _log_in_file(trainer: pl.Trainer) -> None:
    """Write the step's row to metrics.csv before its checkpoint: a run resumed from that does not log the step again."""
    loggers = trainer.loggers
    trainer.loggers = [logger for logger in loggers if isinstance(logger, CSVLogger)]
    try:
        trainer._logger_connector.update_train_step_metrics()
    finally:
        trainer.loggers = loggers


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after this batch, for `val_check_interval=n, check_val_every_n_epoch=None`."""
    if not trainer.enable_validation or trainer.check_val_every_n_epoch is not None:
        return False
    interval = trainer.val_check_batch
    return isinstance(interval, int) and (trainer.fit_loop.total_batch_idx + 1) % interval == 0

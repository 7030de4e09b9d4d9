"""One job of train.py: a composed config becomes a trained, measured run, or goes on where it was stopped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.command_line import check_choices, chosen_by_itself
from launch.errors import quiet, reported
from launch.evaluate.measure import check_data, checked, leave_out_measurement, needs_images
from launch.options import RunOptions, check_present, check_run
from launch.process_environment import is_rank_zero
from launch.run.build import Stage, build, build_seeded, build_stages, build_trainer, check_fit, fit_stages
from launch.run.final import finish
from launch.run.folder import RunFolder
from launch.run.plan import plan
from launch.run.processes import isolated_job
from launch.run.remote_files import fetch
from launch.run.teachers import expand_teachers
from launch.signals import stoppable
from launch.sweep.jobs import at_once, placed
from launch.sweep.search import check_interval, check_measured, check_multirun, last_monitored
from launch.sweep.study import Pruned, report_to_study, trial_number
from lightning_modules import Method

_NOT_STORED = ("folder", "download", "plan")  # a run may be moved, and none of these changes it


def run_job(cfg: DictConfig) -> float | None:
    """Train the run of a composed config, in a sweep or alone.

    Args:
        cfg: The config, whose folder becomes the one that Hydra made for the job.

    Returns:
        The last value of the run's curve, which a search minimises; None where there is no curve or the run was pruned.

    Raises:
        SystemExit: With code 1, after one line, for bad options or input; of a job of a sweep JobFailed.
    """
    hydra_config = HydraConfig.get()
    cfg.folder = os.path.relpath(hydra_config.runtime.output_dir)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    with (
        reported(cfg.folder, sweep=sweep, shared=at_once(hydra_config.launcher)),
        _no_empty_folder(cfg.folder),
        placed(cfg.trainer, hydra_config.launcher),
        stoppable(cfg.folder),
    ):
        quiet()
        return train(cfg, hydra_config)


@contextmanager
def _no_empty_folder(path: str) -> Iterator[None]:
    """Hydra makes a job's folder before its options are checked: without a run in it it goes again."""
    try:
        yield
    finally:
        with suppress(OSError):
            os.rmdir(path)


def train(cfg: DictConfig, hydra_config: DictConfig) -> float | None:
    """Train the run, or say its plan or that it is complete; see `run_job`.

    Raises:
        ValueError: For options that do not fit each other, the data or an earlier part of the run.
        OSError: For missing files, or a folder that can't be written.
    """
    check_multirun(hydra_config)
    folder, search = RunFolder(cfg.folder), trial_number(hydra_config) is not None
    config = checked_config(cfg)
    folder.check(config)
    print_automatic_choices()
    if cfg.plan:
        print(plan(cfg))
        return None
    if folder.complete():
        print(
            f"{folder.path} is complete:\n\n{folder.results_table()}\n\nChoose another name=... or seed=... to train again."
        )
        return last_monitored(folder, search)
    if search:
        check_measured(cfg)
        if folder.pruned.exists():
            return None
    if cfg.download:
        fetch(config)
    run = Run.build(cfg, folder)
    if search:
        check_interval(cfg, run.method.total_steps)
        report_to_study(run.trainer, folder, hydra_config)
    run.fit(config)
    return None if search and folder.pruned.exists() else last_monitored(folder, search)


def checked_config(cfg: DictConfig) -> dict[str, Any]:
    """Complete the config in place and check its options.

    Returns:
        The plain values that the run's folder keeps.

    Raises:
        ValueError: For an option that is unknown, missing, of the wrong type, or that does not fit others.
    """
    check_choices()
    if "sweep" in cfg:
        raise ValueError("sweep=wandb is for W&B: say `wandb sweep conf/sweep/wandb.yaml`, then `wandb agent ...`")
    expand_teachers(cfg)
    check_present(cfg, RunOptions, "train.py")
    leave_out_measurement(cfg)
    check_run(cfg)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return {option: value for option, value in config.items() if option not in _NOT_STORED}


def print_automatic_choices() -> None:
    """Print, in the first process, which recipe and teacher the run takes without being told."""
    if not is_rank_zero():
        return
    if recipe := chosen_by_itself("recipe"):
        print(f"recipe={recipe}, the settings for this method and data (conf/recipe)", flush=True)
    if (teacher := chosen_by_itself("teacher")) not in (None, "none"):
        print(
            f"teacher={teacher}, by the data; teacher=NAME (conf/teacher) or teacher=runs/NAME chooses another",
            flush=True,
        )


@dataclass(frozen=True)
class Run:
    """What a run's config describes, built.

    Attributes:
        folder: The run's.
        method: What is trained.
        data: The image data set.
        training: What the method trains on.
        evaluation: The settings of the final measurement.
        stages: What is trained before the method.
        trainer: Of the method.
    """

    folder: RunFolder
    method: Method
    data: pl.LightningDataModule
    training: pl.LightningDataModule
    evaluation: dict[str, Any]
    stages: list[Stage]
    trainer: pl.Trainer

    @classmethod
    def build(cls, cfg: DictConfig, folder: RunFolder) -> "Run":
        """Build all parts, so that whatever is wrong shows before anything is written, and not after training.

        Raises:
            ValueError: For parts that do not fit each other.
            OSError: For missing files.
        """
        data, method = build(cfg.data), build_seeded(cfg.method, cfg.seed)
        check_fit(method, data)
        training, evaluation = method.training_data(data), checked(build(cfg.evaluation), data)
        if training is data or needs_images(evaluation):
            data.check_source()
        stages = build_stages(cfg, method, data, folder)
        return cls(folder, method, data, training, evaluation, stages, build_trainer(cfg, method, folder))

    def fit(self, config: dict[str, Any]) -> None:
        """Train the stages and the method, from their last checkpoints on, then measure the student, unless a search prunes it.

        Args:
            config: Plain, for the run's folder and the loggers.

        Raises:
            ValueError: Where another process trains this run, or another one with this name has begun.
        """
        trainers = [*(stage.trainer for stage in self.stages), self.trainer]
        with isolated_job(*trainers), self.folder.held(config) if is_rank_zero() else nullcontext():
            for logger in self.trainer.loggers:
                logger.log_hyperparams(config)
            check_data(self.evaluation, self.data)
            fit_stages(self.stages, self.method, self.folder)
            try:
                self.trainer.fit(self.method, self.training, ckpt_path=self.folder.resume())
            except Pruned as reason:  # on every rank
                print(f"{self.folder.path} {reason}", flush=True)
                return
            finish(self.method, self.data, self.training, self.evaluation, self.folder, self.trainer)

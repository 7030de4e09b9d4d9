"""From a config to objects, the one place that instantiates; and the stages that a method trains before it."""

import copy
import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint

from launch.option_types import check_targets
from launch.process_environment import is_rank_zero
from launch.run.folder import RunFolder
from launch.run.processes import LeavesSignals, check_present, choose_strategy, process_count
from launch.run.strategies import check_machines
from launch.run.trainer_options import check_options, lightning_options
from lightning_modules import Method
from stillhouse.checks import check_counts, check_memory
from stillhouse.diffusion.teacher import Teacher
from stillhouse.files import write_json

_STAGE_CALLBACKS = ("clock", "checkpoints", "guard", "progress", "requeue")  # nothing of a stage is sampled


def build(node: DictConfig | None) -> Any:
    """The object (or dict of objects) that a config node describes; plain containers only reach constructors.

    Raises:
        ValueError: Before anything is built, as `launch.option_types.check_node`.
    """
    check_targets(node)
    return instantiate(node, _convert_="all")


def build_seeded(node: DictConfig, seed: int) -> Any:
    """As `build`, with random weights from `seed` alone: without it each process of torch would draw others.

    So a run that is measured again has the teacher that it was trained on, even one with random weights.

    Raises:
        ValueError: For a seed of 2^32 or more.
    """
    if seed >= 1 << 32:
        raise ValueError(f"seed={seed} is too large for numpy; choose one from 0 to {(1 << 32) - 1}")
    pl.seed_everything(seed, workers=True, verbose=False)
    return build(node)


def check_fit(method: Method, data: Any) -> None:
    """Check that teacher, network and data fit each other, which might show only after training.

    Raises:
        ValueError: Where network and data differ in size or classes, or a teacher is of another kind than the method learns from.
    """
    for teacher in method.learned_teachers():
        if method.takes_consistency_model and not teacher.is_consistency_model:
            raise ValueError(
                f"method={method.name} goes on from a finished consistency model, and teacher {teacher.name} is a diffusion "
                "model: say teacher=runs/NAME, a run of method=ect or of another whose samples are renoised"
            )
        if teacher.is_consistency_model and not method.takes_consistency_model:
            raise ValueError(
                f"method={method.name} learns from the estimates of a diffusion model, and teacher {teacher.name} is a "
                "consistency model: say another teacher"
            )
    unseen = [t for t in (method.teacher, method.sampler) if t is not None and t not in method.learned_teachers()]
    for teacher in unseen:
        if teacher.guided:
            raise ValueError(
                f"method={method.name} does not learn from teacher {teacher.name} here, so that its guidance would change "
                "nothing: leave teacher.guidance out"
            )
    network = method.student.network
    pairs = [("resolution", network.resolution, data.resolution), ("channels", network.in_channels, data.channels)]
    if data.num_classes:
        pairs.append(("num_classes", network.num_classes, data.num_classes))
    if method.teacher is not None:
        pairs.append(("num_classes in use", method.teacher.num_classes, data.num_classes))
    _check_equal("the network", pairs, data)


def check_teacher(teacher: Teacher, data: Any) -> None:
    """Check that a teacher's images are of the data's size and classes.

    Raises:
        ValueError: Where a teacher's images differ from the data's in size or classes.
    """
    keys = ("resolution", "channels", "num_classes")
    _check_equal(f"teacher {teacher.name}", [(key, getattr(teacher, key), getattr(data, key)) for key in keys], data)


def _check_equal(owner: str, pairs: Iterable[tuple[str, int, int]], data: Any) -> None:
    for option, ours, theirs in pairs:
        if ours != theirs:
            labels = ", or set data.conditional=true" if option.startswith("num_classes") and not theirs else ""
            raise ValueError(
                f"{owner} has {option}={ours}, the data {data.name} {theirs}: choose a teacher that fits the data{labels}"
            )


def build_trainer(
    config: DictConfig, method: Method, folder: RunFolder, here: bool = True, run: RunFolder | None = None
) -> pl.Trainer:
    """A Trainer for endless loaders, in the run folder, with its strategy chosen by the number of processes.

    here: whether the run is for this machine, and is refused where that lacks something; else the Trainer can't train.
    run: the one that a stage's folder is a part of.
    """
    options = dict(build(config.trainer))
    check_options(options)
    intervals = ("validate_every_n_steps", "log_every_n_steps")
    check_counts(**{f"trainer.{key}": options[key] for key in intervals})
    validate_every = options.pop("validate_every_n_steps")
    processes = process_count(options["devices"], options["num_nodes"], options["accelerator"])
    if here:
        check_present(options["devices"], options["accelerator"])
        check_machines(options["num_nodes"])
    for option, count in (("batch_size", config.batch_size), ("method.held_out", config.method.get("held_out") or 0)):
        if count % processes:
            raise ValueError(f"{option}={count} can't be shared by the {processes} processes of trainer.devices")
    if config.batch_size // processes % method.group_size:
        raise ValueError(
            f"batch_size={config.batch_size} on {processes} device{'s' * (processes > 1)} can't be divided into groups of "
            f"method.group_size={method.group_size}: make it a multiple of {processes * method.group_size}"
        )
    if here:  # a device's share of the images and as much noise, float32: the least that a step holds
        share = 2 * 4 * math.prod(method.image_shape) * config.batch_size // processes
        check_memory(share, f"batch_size={config.batch_size} (lower it): the images and noise of a step")
    options["strategy"] = choose_strategy(options["strategy"], processes)
    owner = (run or folder).checkpoint_owner(OmegaConf.to_container(config, resolve=True), method.name)
    options, first = lightning_options(options, method, folder.path, here, owner)
    if not here:
        accelerator = "cpu" if options["accelerator"] in ("gpu", "cuda") else options["accelerator"]
        options |= {"accelerator": accelerator, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    # Those of the options first: what they switch on for a step is off when the others measure after it.
    callbacks = first + [callback for callback in build(config.callbacks).values() if callback is not None]
    for callback in callbacks:
        if hasattr(callback, "check_method"):  # here, before the method's stages are trained
            callback.check_method(method)
    loggers = [logger for logger in build(config.logger).values() if logger is not None]
    try:
        trainer = pl.Trainer(
            **options,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            max_steps=method.total_steps,
            max_epochs=-1,
            val_check_interval=validate_every,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if method.monitor else 0,
            num_sanity_val_steps=0,
            default_root_dir=folder.path,
            callbacks=callbacks,
            logger=loggers,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except TypeError as error:  # an unknown option, or one of another type
        raise ValueError(f"trainer: {error}") from error
    trainer._signal_connector = LeavesSignals(trainer)
    return trainer


@dataclass(frozen=True)
class Stage:
    """A method that is trained before the run's.

    Attributes:
        method: What is trained.
        data: What it trains on.
        trainer: Of the run's kind.
        folder: runs/NAME/STAGE.
    """

    method: Method
    data: pl.LightningDataModule
    trainer: pl.Trainer
    folder: RunFolder


def build_stages(config: DictConfig, method: Method, data: Any, folder: RunFolder, here: bool = True) -> list[Stage]:
    """The method's stages, each with a trainer of the run's kind that keeps its files in runs/NAME/STAGE.

    here: as of `build_trainer`.
    """
    stages = []
    for name, module in method.stages().items():
        part = RunFolder(folder.path / name)
        cfg = copy.deepcopy(config)
        cfg.folder, cfg.batch_size = str(part.path), module.batch_size
        kept = (*_STAGE_CALLBACKS, "ema") if module.averaged_stage else _STAGE_CALLBACKS
        cfg.callbacks = {key: value for key, value in cfg.callbacks.items() if key in kept}
        if cfg.callbacks.get("progress"):
            OmegaConf.update(cfg.callbacks, "progress.stage", name, force_add=True)
        cfg.logger = {key: value for key, value in cfg.logger.items() if key == "csv"}
        trainer = build_trainer(cfg, module, part, here, folder)
        stages.append(Stage(module, module.training_data(data), trainer, part))
    return stages


def fit_stages(stages: list[Stage], method: Method, folder: RunFolder) -> None:
    """Train the stages that are missing, and write what they cost into preparation.json."""
    for stage in stages:
        stage.trainer.fit(stage.method, stage.data, ckpt_path=stage.folder.resume())
        if is_rank_zero():
            stage.folder.last.unlink(missing_ok=True)  # what the stage is for lies elsewhere, complete
        stage.trainer.strategy.optimizers = []  # whose moments nobody needs any more
        gc.collect()  # DDP's hooks in networks that stages share go with it
    cost = method.preparation(folder.path)
    if cost is not None and is_rank_zero():
        write_json(folder.preparation, cost)

"""All options of a program or task, checked at once before anything is built of them."""

import re
from collections.abc import Mapping
from typing import Any, TypedDict, get_type_hints

import pytorch_lightning as pl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from launch.command_line import choices, typed_options
from launch.evaluate.measure import EvaluationOptions
from launch.option_types import UnknownOption, check_targets, check_value
from launch.run.trainer_options import TrainerOptions
from lightning_modules import Method
from stillhouse.diffusion.teacher import Teacher
from stillhouse.files import check_folder_name


class RunOptions(TypedDict):
    """The options of train.py, in the order in which they are checked."""

    name: str
    folder: str
    seed: int
    batch_size: int
    plan: bool
    download: bool
    data: pl.LightningDataModule
    teacher: Teacher | dict[str, None]  # teacher=none is an empty one
    evaluation: EvaluationOptions
    trainer: TrainerOptions
    method: Method
    callbacks: Mapping[str, pl.Callback | None]
    logger: Mapping[str, Logger | None]


def check_run(cfg: DictConfig) -> None:
    """Check all options of train.py.

    Raises:
        ValueError: For one that is unknown, missing or of the wrong type.
    """
    try:
        check_options(cfg, RunOptions, "train.py")
    except UnknownOption as error:
        recipe = HydraConfig.get().runtime.choices.get("recipe") if HydraConfig.initialized() else None
        if recipe and OmegaConf.select(_recipe(recipe), error.key) is not None:
            raise ValueError(
                f"recipe={recipe} is for another method: {error.key} is unknown to {error.owner}"
            ) from None
        raise

    check_folder_name("name", cfg.name, "runs", several=True)
    if HydraConfig.initialized() and any(re.match(r"[+~]*folder\b", o) for o in typed_options()):
        raise ValueError("folder is not an option: name=NAME makes it runs/NAME")
    if cfg.callbacks.get("checkpoints") is None:
        raise ValueError(
            "callbacks.checkpoints=null would lose the training, since a checkpoint is what is evaluated: put it back; "
            "callbacks.checkpoints.every_n_steps says how often one is written"
        )


def _recipe(name: str) -> Any:
    recipe = GlobalHydra.instance().config_loader().repository.load_config(f"recipe/{name}")
    return recipe.config if recipe else OmegaConf.create()


def check_options(cfg: DictConfig, options: type, owner: str) -> None:
    """Check all options of a program or task.

    Args:
        cfg: The composed config.
        options: A TypedDict of the options, with their types.
        owner: What takes them, for the message.

    Raises:
        ValueError: For an option that is unknown, missing or of the wrong type.
    """
    check_present(cfg, options, owner)  # first, since values of others may refer to it
    kinds = get_type_hints(options)
    for name, kind in kinds.items():
        if name in cfg:
            check_value(name, cfg[name], kind)
    for name in cfg:
        if name not in kinds:
            # What a method's config puts beside it for its options to choose from, such as time_distributions.
            choices = isinstance(cfg[name], DictConfig) and all(
                isinstance(choice, DictConfig) for choice in cfg[name].values()
            )
            if not choices:
                raise UnknownOption(str(name), str(name), list(kinds), owner)
            check_targets(cfg[name])


def check_present(cfg: DictConfig, options: type, owner: str) -> None:
    """Check that no option is missing; the rest is as of `check_options`."""
    for name in get_type_hints(options):
        if name not in cfg and name in options.__required_keys__:
            raise ValueError(f"{name} is missing: {owner} needs it{_group_hint(name)}")


def _group_hint(name: str) -> str:
    return f"; say {name}=NAME (conf/{name})" if choices(name) else ""

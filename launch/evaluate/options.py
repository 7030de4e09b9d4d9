"""Options that several tasks of evaluate.py have, and what their values mean."""

from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from launch.allocator import keep_freed_memory
from launch.evaluate.measure import EvaluationOptions, measures_nothing
from launch.run.build import build
from launch.run.remote_files import fetch
from stillhouse.diffusion.teacher import Teacher


class MeasurementOptions(TypedDict):
    """conf/task/shared/measurement.yaml."""

    evaluation: NotRequired[EvaluationOptions]
    num_samples: int | None
    blocks: int | None
    metrics: Sequence[str] | None
    device: str
    download: bool


class WeightsOptions(TypedDict):
    """Which of a run's weights are taken. Names of averages are looked up in its checkpoints."""

    weights: Any
    checkpoint: str | None


class DataOptions(TypedDict):
    """conf/task/shared/data.yaml."""

    data: pl.LightningDataModule
    batch_size: int
    seed: int


class TeacherOptions(TypedDict):
    """conf/task/shared/teacher.yaml."""

    teacher: Teacher
    data: pl.LightningDataModule
    batch_size: int
    seed: int


def names(value: Any, option: str) -> list[str]:
    """List the names that an option gives.

    Args:
        value: One name or a list of some.
        option: The option's name, for the message.

    Raises:
        ValueError: For an empty list, or a value that is no name.
    """
    given = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    if not isinstance(given, list) or not given or any(type(name) not in (str, int, float) for name in given):
        raise ValueError(f"{option}={value} must be a name or a list of some, such as '{option}=[runs/A,runs/B*]'")
    return [str(name) for name in given]


def run_folders(value: Any, option: str = "run") -> list[Path]:
    """List the run folders that an option's names and patterns stand for, each once, in their order.

    Raises:
        FileNotFoundError: For a pattern that matches no run.
        ValueError: As `names`.
    """
    return matching_folders(names(value, option), lambda path: (path / "config.yaml").is_file(), option)


def matching_folders(patterns: Sequence[str], wanted: Callable[[Path], bool], option: str = "run") -> list[Path]:
    """List the wanted ones of the folders that names and patterns stand for, each once, in their order.

    Raises:
        FileNotFoundError: For a pattern that matches none of them.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_dir() else sorted(glob(pattern))  # a name may hold brackets
        matches = [path for path in map(Path, found) if wanted(path)]
        if not matches:
            raise FileNotFoundError(
                f"{option}={pattern} names no run (a folder with the config.yaml that train.py writes)"
            )
        folders.update(dict.fromkeys(matches))
    return list(folders)


def step_counts(value: Any) -> list[int]:
    """List the numbers of steps in `steps`, each once; an empty list stands for each subject's own number.

    Raises:
        ValueError: For anything but whole numbers from 1 on.
    """
    if value is None:
        return []
    steps = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    if not isinstance(steps, list) or not steps or not all(type(count) is int and count > 0 for count in steps):
        raise ValueError(f"steps={value} must be whole numbers from 1 on, such as 'steps=[1,2,4]'")
    return list(dict.fromkeys(steps))


def path_option(cfg: DictConfig, option: str) -> Path:
    """Return the file or folder that an option names.

    Raises:
        ValueError: For a value that is no name.
    """
    if type(cfg[option]) not in (str, int) or not str(cfg[option]):
        raise ValueError(f"{option}={cfg[option]} must be the name of a file or folder")
    return Path(str(cfg[option]))


def compute_device(name: str) -> torch.device:
    """Return the device that `device=NAME` asks for; auto is a GPU where there is one.

    Raises:
        ValueError: For a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} can't be used here ({error}); choose cpu, cuda or auto") from error


def evaluation_settings(cfg: DictConfig, stored: DictConfig | None = None) -> dict[str, Any]:
    """Build the settings of a measurement, as the command gives them, else as a run's config does.

    Args:
        cfg: The task's options, with `MeasurementOptions`.
        stored: The config of the run that is measured, if one is.

    Raises:
        ValueError: For none, and for evaluation=none.
    """
    if "evaluation" not in cfg and stored is None:
        raise ValueError("evaluation is missing: say evaluation=NAME (conf/evaluation)")
    settings = build(cfg.evaluation if "evaluation" in cfg else stored.evaluation)
    changes = {key: cfg[key] for key in ("num_samples", "blocks", "metrics") if cfg[key] is not None}
    settings |= OmegaConf.to_container(OmegaConf.create(changes))
    if measures_nothing(settings):
        choose = (
            "choose another one" if stored is None else "it was trained so; choose another one by evaluation=pixels"
        )
        raise ValueError(f"evaluation=none measures nothing: {choose}")
    return settings


def fetch_missing(cfg: DictConfig, *parts: str) -> None:
    """Fetch, with download=true, what the config names, lacks and has an address of.

    Args:
        cfg: The task's options.
        parts: Options to look at (none: all).
    """
    if cfg.download:
        config = OmegaConf.to_container(cfg, resolve=True)
        fetch({part: config[part] for part in parts or config})

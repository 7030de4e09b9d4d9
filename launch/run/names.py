"""Names: of the folders that a sweep's jobs live in, of the recipe that a run takes by itself, of configs in a list,
of a folder of pictures."""

import hashlib
import os
import re
from pathlib import PurePath
from typing import Any

from omegaconf import OmegaConf

from stillhouse.files import check_folder_name

LONGEST = 120  # file systems take names of up to 255 bytes


def run_folder(name: Any) -> str:
    """runs/NAME; runs/ alone of what is no such name, which Hydra makes before the program can refuse the name."""
    try:
        check_folder_name("name", str(name), "runs", several=True)
    except ValueError:
        return "runs"
    return f"runs/{name}"


def run_name(name: str, options: str) -> str:
    """The run's name and the options that are not in it yet, safe as a folder name and as a command-line value."""
    suffix = re.sub(r"[^A-Za-z0-9_.+-]+", "-", options).strip("-")
    if len(suffix) > LONGEST:
        suffix = f"{suffix[:LONGEST]}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"
    return f"{name}-{suffix}" if suffix else name


def joined(*parts: str) -> str:
    """Those that are not empty, with underscores between them: a recipe's name of method, host if it has one, and data."""
    return "_".join(part for part in parts if part)


def data_of(teacher: str) -> str:
    """The data set that a teacher of conf/teacher is named after: digits of digits_rf1, cifar10 of cifar10_cond_ve."""
    return re.sub(r"(_(rf\d+|cond|baseline|vp|ve|ddpm))+$", "", teacher)


def names_in(value: Any) -> str | None:
    """The names in a plain list of configs that each have one, as method.teachers is: "digits_rf1,digits_rf2"; else None."""
    named = isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value)
    return ",".join(str(one["name"]) for one in value) if named else None


def picture_set(path: str, resolution: int) -> str:
    """The name of pictures at `path`: my_photos64; with a hash of the path where its last part alone could mean another."""
    path = str(path)  # a number is refused later, by the option's name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(path).name).strip("-")
    if plain == path:
        return f"{plain}{resolution}"
    return f"{plain or 'pictures'}{resolution}-{hashlib.sha256(os.path.normpath(path).encode()).hexdigest()[:6]}"


def register_resolvers() -> None:
    """Make these functions known to conf/ (sweeps' folders, recipes, evaluate.yaml's data, image_folder)."""
    for resolver in (run_folder, run_name, joined, data_of, picture_set):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)

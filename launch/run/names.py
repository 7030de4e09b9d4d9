"""Names that conf/ computes: of run folders, of choices that options left open, of a folder of pictures."""

import hashlib
import os
import re
from pathlib import PurePath
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import ListConfig, OmegaConf

from stillhouse.files import check_folder_name

LONGEST = 120  # characters of options in a name: file systems take names of up to 255 bytes
MANY_CLASSES = 1000
SMALLEST, ATTENTION, DOUBLED = 8, 16, 32  # pixels


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


def published(teacher: str, otherwise: str) -> str:
    """The teacher of this name where conf/teacher has one, else another: the default of config.yaml and of some methods."""
    return teacher if _configs().config_exists(f"teacher/{teacher}") else otherwise


def network_for(data: str) -> str:
    """The network in conf/teacher/network that suits a data set of conf/data: by its size and its number of classes."""
    stored = _configs().load_config(f"data/{data}")
    config = stored.config if stored else {}
    config = config.get("data", config)  # of a run
    if config.get("resolution") == 1:
        return "mlp"
    return "adm" if config.get("num_classes", 0) >= MANY_CLASSES else "ddpmpp"


def channel_factors(resolution: int) -> ListConfig:
    """`channel_mult` of a U-Net for images of so many pixels: the channels are doubled from 32 pixels on, as EDM has it."""
    return OmegaConf.create([1 if level > DOUBLED else 2 for level in _levels(resolution)])


def attention_at(resolution: int) -> ListConfig:
    """`attn_resolutions` of the same U-Net: its first level of at most 16 pixels, as EDM has it."""
    return OmegaConf.create([level for level in _levels(resolution) if level <= ATTENTION][:1])


def halved(number: int) -> int:
    """Half of a number, rounded down."""
    return number // 2


def _levels(resolution: int) -> list[int]:
    """Resolutions halved down to 8 pixels, or as far as they are even."""
    levels = [resolution]
    while levels[-1] % 2 == 0 and levels[-1] // 2 >= SMALLEST:
        levels.append(levels[-1] // 2)
    return levels


def _configs() -> Any:
    return GlobalHydra.instance().config_loader().repository


def data_of(teacher: str) -> str:
    """The data set of a teacher: digits of digits_rf1, cifar10 of cifar10_cond_ve, and of a run folder the run's own."""
    return (
        teacher
        if "/" in teacher
        else re.sub(r"(_(rf\d+|cond|baseline|vp|ve|ddpm|ect|sid|cd|edm2_(s|m|l|xl)))+$", "", teacher)
    )


def picture_set(path: str, resolution: int, channels: int = 3) -> str:
    """The name of pictures at `path`: my_photos64, my_photos64-grey with one channel; with a hash of the path where its last part
    alone could mean another.
    """
    path = str(path)  # a number is refused later, by the option's name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(path).name).strip("-")
    size = f"{resolution}-grey" if channels == 1 else f"{resolution}"
    if plain == path:
        return f"{plain}{size}"
    return f"{plain or 'pictures'}{size}-{hashlib.sha256(os.path.normpath(path).encode()).hexdigest()[:6]}"


def register_resolvers() -> None:
    """Make these functions known to conf/."""
    for resolver in (
        run_folder,
        run_name,
        joined,
        published,
        network_for,
        channel_factors,
        attention_at,
        halved,
        data_of,
        picture_set,
    ):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)

"""Names: of the folders that a sweep's jobs live in, of the recipe that a run takes by itself."""

import hashlib
import re

from omegaconf import OmegaConf

LONGEST = 120  # file systems take names of up to 255 bytes


def run_name(name: str, options: str) -> str:
    """The run's name and the options that are not in it yet, safe as a folder name and as a command-line value."""
    suffix = re.sub(r"[^A-Za-z0-9_.+-]+", "-", options).strip("-")
    if len(suffix) > LONGEST:
        suffix = f"{suffix[:LONGEST]}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"
    return f"{name}-{suffix}" if suffix else name


def joined(*parts: str) -> str:
    """Those that are not empty, with underscores between them: a recipe's name of method, host if it has one, and data."""
    return "_".join(part for part in parts if part)


def register_resolvers() -> None:
    """Make `${run_name:...}` and `${joined:...}` known to the config (hydra.sweep.subdir, the recipe of conf/config.yaml)."""
    for resolver in (run_name, joined):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)

"""Names of the folders that a sweep's jobs live in."""

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


def register_run_name() -> None:
    """Make `${run_name:...}` known to the config (hydra.sweep.subdir uses it); no other resolver is needed."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)

"""Processes: the strategy for several devices, and Hydra and Lightning's DDP launcher made to agree."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import read_write

from launch.errors import GRACE
from networks.checks import check_counts

_DDP_ENVIRONMENT = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def process_count(devices: int | str | Sequence[int], num_nodes: int, accelerator: str) -> int:
    """How many processes `trainer.devices` and `trainer.num_nodes` ask for."""
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)*", devices):
        devices = int(devices) if devices.isdigit() else devices.split(",")
    if devices in ("auto", -1, "-1"):
        local = max(torch.cuda.device_count(), 1) if accelerator != "cpu" else 1
    elif isinstance(devices, int) and devices > 0:
        local = devices
    elif isinstance(devices, Sequence) and devices and not isinstance(devices, str):
        local = len(devices)
    else:
        raise ValueError(f"trainer.devices={devices!r}: give a positive number, a list of device numbers, or auto")
    check_counts(**{"trainer.num_nodes": num_nodes})
    return local * num_nodes


def choose_strategy(strategy: str, processes: int) -> str:
    """DDP must look for unused parameters: a step may leave some without gradient (label layers, alternating turns)."""
    if strategy != "auto":
        return strategy
    return "auto" if processes == 1 else "ddp_find_unused_parameters_true"


def is_rank_zero() -> bool:
    """Also true before the process group exists, in the process that the user started."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


@contextmanager
def children_ended(*launchers: Any) -> Iterator[None]:
    """After the block no process that Lightning's `launchers` started runs any more; where the block failed, by a kill.

    Errors: ChildProcessError where a child failed by itself. A collective then fails here too, but says only that it did.
    """
    children: list[subprocess.Popen] = []
    try:
        yield
        children = _released(launchers)
        codes = [child.wait() for child in children]
    except BaseException as error:
        children = children or _released(launchers)
        collective = isinstance(error, RuntimeError) and bool(children)  # perhaps: then a child ends soon
        patience = time.monotonic() + GRACE + 5
        while collective and time.monotonic() < patience and not any(child.poll() for child in children):
            time.sleep(0.05)
        codes = [child.poll() for child in children]
        for child in children:
            child.kill()
            child.wait()
        if not (collective and any(codes)):
            raise
    if any(codes):
        failed = ", ".join(f"{rank} (exit code {code})" for rank, code in enumerate(codes, start=1) if code)
        raise ChildProcessError(f"another process of this run failed, see its message above: rank {failed}")


def _released(launchers: Sequence[Any]) -> list[subprocess.Popen]:
    """The launchers' children; Lightning's thread that would end this process, hence a sweep, for a failed one lets go."""
    children: list[subprocess.Popen] = []
    for launcher in launchers:
        watched = getattr(launcher, "procs", [])
        children += watched
        watched.clear()
    return children


@contextmanager
def one_job(*trainers: pl.Trainer) -> Iterator[None]:
    """Make the child processes of a DDP run repeat this job alone, in its folder, and leave no trace for the next one.

    trainers: all that the job uses, one after the other; the first starts the children, who do the same.

    Lightning starts a child by repeating the command line, which under --multirun would be the whole sweep.

    Errors: ChildProcessError where another process failed after this one was done.
    """
    hydra = HydraConfig.get()
    argv = sys.argv
    environment = {key: os.environ.get(key) for key in _DDP_ENVIRONMENT}
    with read_write(HydraConfig.instance().cfg.hydra):
        HydraConfig.instance().cfg.hydra.run.dir = hydra.runtime.output_dir
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    shared = ("hydra.searchpath=", "hydra/sweeper=", "hydra.sweeper.trial=")  # all processes of a trial give it up
    search = [override for override in hydra.overrides.hydra if override.startswith(shared)]
    sys.argv = [argv[0], f"--config-name={hydra.job.config_name}", *folders, *hydra.overrides.task, *search]
    try:
        with children_ended(*(trainer.strategy.launcher for trainer in trainers)):
            yield
    finally:
        sys.argv = argv
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

"""Processes: the strategy for several devices, and Hydra and Lightning's DDP launcher made to agree."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import read_write
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from launch.command_line import typed_options
from launch.errors import collective
from launch.process_environment import started_processes, under_torchrun
from launch.run.strategies import AveragedGradients, CountedDDP
from launch.signals import NOTICE, stopped_by
from stillhouse.checks import check_counts

# Seconds until a process that failed must have ended: launch/errors.py lets it wait, and a busy machine is slow.
_PATIENCE = 60
# Seconds in which a process notices that another one has gone, by its collectives; then it is ended.
_UNNOTICED = 10
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


def check_present(devices: int | str | Sequence[int], accelerator: str) -> None:
    """Check that this machine has the GPUs that are asked for.

    Raises:
        ValueError: For GPUs that this machine has not.
    """
    present = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not present:
        raise ValueError(f"trainer.accelerator={accelerator}: torch sees no GPU here; use trainer.accelerator=cpu")
    wanted = process_count(devices, 1, accelerator)
    if accelerator != "cpu" and present and wanted > present:
        raise ValueError(
            f"trainer.devices={devices}: this machine has {present} GPU{'s' * (present > 1)}; use trainer.devices=auto for all"
        )


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "averaged": AveragedGradients,
    "ddp": CountedDDP,
    "ddp_find_unused_parameters_true": partial(CountedDDP, find_unused_parameters=True),
}
_NOT_HERE = {  # by the beginning of the name
    "fsdp": "it cuts one network into pieces, where a method here has several, each with its own optimiser and average",
    "deepspeed": "it takes a single optimiser, where a method here may have several",
    **dict.fromkeys(
        ("ddp_spawn", "ddp_fork", "ddp_notebook"),
        "what its processes have learned stays in them, and rank 0 is one of them",
    ),
}


def choose_strategy(strategy: str, processes: int) -> str | Strategy:
    """Return what pl.Trainer gets for `trainer.strategy`: for several processes with the way that they find each other.

    auto: "auto" of a single process, `AveragedGradients` of several.

    Raises:
        ValueError: For an unknown name, and where srun or torchrun started another number of processes.
    """
    if strategy != "auto" and strategy not in STRATEGIES:
        reason = next((text for start, text in _NOT_HERE.items() if str(strategy).startswith(start)), None)
        raise ValueError(
            f"trainer.strategy={strategy} is {f'not supported: {reason}' if reason else 'unknown'}; choose auto, "
            + ", ".join(STRATEGIES)
        )
    environment = find_each_other(processes)
    if strategy == "auto" and processes == 1:
        return "auto"
    return STRATEGIES["averaged" if strategy == "auto" else strategy](cluster_environment=environment)


def find_each_other(processes: int) -> ClusterEnvironment:
    """Return how the processes of a run find each other.

    Raises:
        ValueError: Where srun or torchrun started another number of processes.
    """
    started = started_processes()
    if started and started != processes:
        starter = "torchrun" if under_torchrun() else "srun"
        raise ValueError(
            f"{starter} started {started} processes, but trainer.devices x trainer.num_nodes is {processes}: make them equal"
        )
    if started and under_torchrun():
        return TorchElasticEnvironment()
    if started:
        # Where --ntasks alone was given, SLURM says neither of these, and Lightning asks for them.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(started // int(os.environ.get("SLURM_NNODES", 1))))
        os.environ.setdefault("SLURM_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        return SLURMEnvironment(auto_requeue=False)  # callbacks/requeue.py does it
    return LightningEnvironment()


class LeavesSignals(_SignalConnector):
    """In place of Lightning's, which broadcasts inside its handler of SIGTERM, where the other ranks do not: launch/signals.py
    has the handlers."""

    def register_signal_handlers(self) -> None:
        pass


@contextmanager
def children_ended(*launchers: Any) -> Iterator[None]:
    """After the block no process that Lightning's `launchers` started runs any more; where the block failed, by a kill.

    Raises:
        ChildProcessError: Where a child failed by itself.
        Stopped: Where a signal ended it. A collective then fails here too, but says only that it did.
    """
    children: list[subprocess.Popen] = []
    try:
        yield
        children = _released(launchers)
        codes = [child.wait() for child in children]
    except BaseException as error:
        children = children or _released(launchers)
        lost = collective(error) and bool(children)  # then a child has ended, or does so as fast as it can
        patience = time.monotonic() + _PATIENCE
        while lost and time.monotonic() < patience and not any(child.poll() for child in children):
            time.sleep(0.05)
        codes = [child.poll() for child in children]
        for child in children:
            child.kill()
            child.wait()
        if not (lost and any(codes)):
            raise
    if any(codes):
        NOTICE.follow(codes)
        raise ChildProcessError(_failed(codes))


def _failed(codes: Sequence[int | None]) -> str:
    """One line about children, in order of rank from 1 on, of which some failed."""
    ends = [
        f"rank {rank} ({f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'})"
        for rank, code in enumerate(codes, start=1)
        if code
    ]
    above = ", see its message above" if any(code and code > 0 for code in codes) else ""
    return f"another process of this run failed{above}: {', '.join(ends)}"


@contextmanager
def _watched(launchers: Sequence[Any], job: str) -> Iterator[None]:
    """Within the block this process ends, in one line, soon after one that it started, or the one that started it.

    It mostly finds out by itself: in a collective, which fails. Not where the device hangs in one, or between them.
    """
    left = threading.Event()
    threading.Thread(target=_watch, args=(launchers, job, left), daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(launchers: Sequence[Any], job: str, left: threading.Event) -> None:
    child, parent = started_processes() is None and int(os.environ.get("LOCAL_RANK", 0)) > 0, os.getppid()
    children: list[subprocess.Popen] = []
    lost, number = None, None
    while lost is None:
        if left.wait(0.5):
            return
        children = [one for launcher in launchers for one in getattr(launcher, "children", [])]
        codes = [one.poll() for one in children]
        if any(codes):
            lost, number = _failed(codes), stopped_by(codes)
        elif child and os.getppid() != parent:
            lost = "the process that started this one has ended"
    if number and NOTICE.given is None:
        os.kill(os.getpid(), number)
    if not left.wait(_UNNOTICED):
        for one in children:
            one.kill()
        sys.stderr.write(f"error: {job}: {lost}\n")
        sys.stderr.flush()
        os._exit(128 + number if number else 1)


def _released(launchers: Sequence[Any]) -> list[subprocess.Popen]:
    """The launchers' children, which are then no longer looked after."""
    children: list[subprocess.Popen] = []
    for launcher in launchers:
        started = getattr(launcher, "children", [])
        children += started
        started.clear()
    return children


@contextmanager
def isolated_job(*trainers: pl.Trainer) -> Iterator[None]:
    """Make the child processes of a DDP run repeat this job alone, in its folder, and leave nothing for the next one.

    trainers: all that the job uses, one after the other; the first starts the children, who do the same.

    Lightning starts a child by repeating the command line, which under --multirun would be the whole sweep.

    Raises:
        ChildProcessError: Where another process failed after this one was done.
        ValueError: For a sweep under torchrun.
    """
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    if sweep and under_torchrun():  # whose store still has the addresses of the job before
        raise ValueError("torchrun can't run a sweep: start it with python, and trainer.devices=N for N processes")
    argv = sys.argv
    environment = {key: os.environ.get(key) for key in _DDP_ENVIRONMENT}
    if sweep and started_processes() and (port := os.environ.get("MASTER_PORT")):
        # Whoever is done with a job first must not meet the others where they still are.
        os.environ["MASTER_PORT"] = str(int(port) + hydra.job.num)
    with read_write(HydraConfig.instance().cfg.hydra):
        HydraConfig.instance().cfg.hydra.run.dir = hydra.runtime.output_dir
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    shared = ("hydra.searchpath=", "hydra/sweeper=", "hydra.sweeper.trial=")  # all processes of a trial give it up
    search = [override for override in hydra.overrides.hydra if override.startswith(shared)]
    sys.argv = [argv[0], f"--config-name={hydra.job.config_name}", *folders, *typed_options(), *search]
    try:
        launchers = [trainer.strategy.launcher for trainer in trainers]
        with _watched(launchers, os.path.relpath(hydra.runtime.output_dir)), children_ended(*launchers):
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

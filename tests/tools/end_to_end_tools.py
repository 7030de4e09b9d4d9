"""Commands as a user types them, each in a process of its own, at sizes that take seconds."""

import atexit
import csv
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra._internal.hydra import Hydra
from torch import Tensor

from stillhouse.checkpoints import save_weights
from stillhouse.networks import SongUNet

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "name=run",
    "batch_size=16",
    "method.kimg=0.2",  # 13 steps
    "teacher.weights=null",
    "teacher.network.model_channels=8",
    "teacher.steps=2",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "evaluation.num_samples=20",
    "evaluation.blocks=2",
    "evaluation.batch_size=20",
    "evaluation.training.every_kimg=0.08",  # steps 5, 10 and 13
    "evaluation.training.num_samples=20",
    "callbacks.checkpoints.every_n_steps=3",
    "callbacks.curves=null",
    "method.warmup_kimg=0.1",
)
STUDENT = (*TINY, "method.pairs=64", "method.held_out=16", "trainer.validate_every_n_steps=4")
PRETRAIN = (*TINY, "method=pretrain")
RUN = Path("runs/run")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/tools", ROOT / "docs/examples/add_a_method"))),
    "STILLHOUSE_PACKAGES": "tract,cheap_extractor,end_to_end_spy,few_step_method",  # of tests' own
    "WANDB_SILENT": "true",
}
LIMIT = 300  # seconds; for machines that are busy with other things


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative for a signal) and what it said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def ok(self) -> "Ended":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        return self

    def killed(self) -> "Ended":
        assert self.code == -signal.SIGKILL, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, *parts: str) -> None:
        """It failed with exactly one line, which holds all `parts`, and without a traceback."""
        assert self.code == 1, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        assert len(self.errors) == 1, self.err
        missing = [part for part in parts if part not in self.errors[0]]
        assert not missing, f"{missing} not in {self.errors[0]}"


class Started:
    """A command under way, its output in `out` and `err`."""

    def __init__(self, process: "subprocess.Popen | multiprocessing.Process", out: Path, err: Path):
        self.process, self.out, self.err = process, out, err

    @property
    def code(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def kill(self) -> Ended:
        self.process.kill()
        return self.wait()

    def wait(self) -> Ended:
        if isinstance(self.process, subprocess.Popen):
            self.process.wait(LIMIT)
        else:
            self.process.join(LIMIT)
        if self.code is None:
            self.process.kill()
            raise TimeoutError(self.err.read_text())
        return Ended(self.code, self.out.read_text(), self.err.read_text())


def start(
    folder: Path, script: str, *arguments: str, before: Callable[[], None] | None = None, fresh: bool = False
) -> Started:
    """Start `python SCRIPT ARGUMENTS` in `folder`: a process of its own, with its own files for stdout and stderr.

    To import torch and Lightning takes longer than a tiny run. So the process is forked from one that has done that
    (`warm_up`), and runs the script as its `__main__`; it costs 0.3 s until the first line of train(), a refused command no
    more. `before` is called first in the new process, and may break things. `fresh`: a new interpreter instead, for tests of
    the start itself.
    """
    out, err = new_outputs(folder)
    if fresh:
        command = [sys.executable, str(ROOT / script), *arguments]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=stdout, stderr=stderr)
        return Started(process, out, err)
    return Started(forked(_run, (folder, script, arguments, out, err, before)), out, err)


def new_outputs(folder: Path) -> tuple[Path, Path]:
    """Empty files in `folder`, made where it is not there, for what a command says on stdout and on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.out")))
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    out.touch()
    err.touch()
    return out, err


def forked(function: Callable[..., None], arguments: tuple[Any, ...]) -> multiprocessing.Process:
    """A process that calls function(*arguments), started from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_up"])
    saved = dict(os.environ)
    os.environ.update(ENVIRONMENT)  # inherited by the process to fork from, which the first call starts
    try:
        process = context.Process(target=function, args=arguments)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return process


def run(folder: Path, script: str, *arguments: str, **options: Any) -> Ended:
    """Start it and wait for its end: for a run, an evaluation or a refusal alike (see `Ended`)."""
    return start(folder, script, *arguments, **options).wait()


def train(folder: Path, *arguments: str, **options: Any) -> Ended:
    return run(folder, "train.py", *arguments, **options)


def evaluate(folder: Path, *arguments: str, **options: Any) -> Ended:
    return run(folder, "evaluate.py", *arguments, **options)


def _run(folder: Path, script: str, arguments: tuple[str, ...], out: Path, err: Path, before) -> None:
    become(folder, script, arguments, out, err)
    if not {"-m", "--multirun"} & set(arguments):
        Hydra.get_mode = lambda *_, **__: None  # else a config is composed twice, once for hydra.mode alone
    if before is not None:
        before()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out


def become(folder: Path, script: str, arguments: tuple[str, ...], out: Path, err: Path) -> None:
    """Let this process be the one that runs the script in `folder`, its output in `out` and `err`."""
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, descriptor)
        os.close(handle)
    sys.argv = [str(ROOT / script), *arguments]


def find(target: str) -> tuple[Any, str]:
    """(owner, name) of "module:Class.function"."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_call(target: str, number: int, act: Callable[..., Any], when: Callable[..., bool] | None = None) -> None:
    """Replace call `number` (from 1) of `target` by act(original, *args); only calls with when(*args) count."""
    owner, name = find(target)
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if (when is None or when(*args)) and next(calls) == number:
            return act(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _dies(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    die()


def _dies_after(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    die()


def kill_at(
    target: str, number: int, when: Callable[..., bool] | None = None, *, after: bool = False
) -> Callable[[], None]:
    """For `before`: the process is killed in call `number` (from 1) of `target`, before it or after it; see `in_call`."""
    return partial(in_call, target, number, _dies_after if after else _dies, when)


def random_teacher(path: Path, seed: int = 0) -> str:
    """The option of a teacher whose weights, none of them zero, every process reads from the file at `path`."""
    generator = torch.Generator().manual_seed(seed)
    size = {"num_classes": 10, "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
    state = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in SongUNet(8, 1, 1, **size).state_dict().items()
    }
    save_weights(path, state, {})
    return f"teacher.weights={path}"


class Finished:
    """Complete runs in one folder, by name, each trained when it is first asked for: runs(NAME) is that folder."""

    def __init__(
        self, folder: Path, options: Mapping[str, Sequence[str]], teachers: Mapping[str, Sequence[str]] | None = None
    ):
        """options: what is typed behind train.py, by name of the run. teachers: other runs that it needs."""
        self.folder, self.options, self.teachers = folder, options, teachers or {}

    def __call__(self, name: str) -> Path:
        for teacher in self.teachers.get(name, ()):
            self(teacher)
        if not (self.folder / "runs" / name / "metrics.json").exists():
            train(self.folder, *self.options[name]).ok()
        return self.folder

    def begin(self, folder: Path, name: str, *without: str) -> Path:
        """`folder` with the data of a complete run but for its parts `without`, and the runs that it needs."""
        source = self(name)
        with_data(source, folder, *without)
        for teacher in self.teachers.get(name, ()):
            shutil.copytree(source / "runs" / teacher, folder / "runs" / teacher)
        return folder

    def assert_resumes(self, folder: Path, name: str, before: Callable[[], None], *without: str) -> list[str]:
        """A run that `before` kills ends, started again, as the one left alone; the lines that say from where it went on."""
        self.begin(folder, name, *without)
        train(folder, *self.options[name], before=before).killed()
        ended = train(folder, *self.options[name]).ok()
        assert_same_run(folder / "runs" / name, self(name) / "runs" / name)
        return [line for line in ended.out.splitlines() if "goes on from" in line]


def with_data(source: Path, folder: Path, *without: str) -> Path:
    """`folder` with a copy of the data that a run in `source` left, except for the parts (of data/) `without`."""
    shutil.copytree(source / "data", folder / "data", ignore=shutil.ignore_patterns(*without))
    return folder


def copied(source: Path, folder: Path) -> Path:
    """`folder` as a copy of `source`: its data and its runs."""
    shutil.copytree(source / "runs", folder / "runs")
    return with_data(source, folder)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and content of every file but the tests' own; equal where nothing was touched in between."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not re.fullmatch(r"\d+\.(out|err)", path.name)
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without its timings."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


def read_json(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.json without timings and traces, whose config differs with the number of processes."""
    return [
        {k: v for k, v in record.items() if k not in ("images_per_second", "provenance")}
        for record in json.loads(path.read_text())
    ]


def read_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def timeless(path: Path) -> dict[str, Any]:
    """A checkpoint without the seconds that training took."""
    state = read_checkpoint(path)
    state["callbacks"].pop("Clock")
    return state


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Tensors and plain values of nested dicts and lists by their path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in leaves(part, f"{path}/{key}").items()}
    return {path: value}


def assert_identical(ours: Any, theirs: Any) -> None:
    """Equal to the last bit, in every leaf."""
    a, b = leaves(ours), leaves(theirs)
    assert a.keys() == b.keys()
    for path, value in a.items():
        same = torch.equal(value, b[path]) if isinstance(value, Tensor) else value == b[path]
        assert same, f"{path}: {value} and {b[path]}"


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two run folders hold the same results: checkpoints (weights, optimiser, averages, best score), curves, metrics."""
    for name in ("last.ckpt", "best.ckpt"):
        path = ours / "checkpoints" / name
        assert path.exists() == (theirs / "checkpoints" / name).exists()
        if path.exists():
            assert_identical(timeless(path), timeless(theirs / "checkpoints" / name))
    assert read_csv(ours / "metrics.csv") == read_csv(theirs / "metrics.csv")
    assert read_json(ours / "metrics.json") == read_json(theirs / "metrics.json")
    assert (ours / "student.safetensors").read_bytes() == (theirs / "student.safetensors").read_bytes()
    assert not [path.name for path in ours.rglob("*.tmp*")]

"""A run's folder: its config is written once, and everything after must agree with it."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stillhouse.analysis.config_groups import names_in
from stillhouse.analysis.tables import records_text
from stillhouse.checkpoints.bounds import check_aliases
from stillhouse.file_locks import hold_lock
from stillhouse.files import check_writable, remove, remove_leftovers, resolve_inside, write_file
from stillhouse.metrics.records import Record, load_records

# The last revision with other checkpoints, which can finish its runs: training goes on from one of today's engine alone.
REVISION = "0d82877"
# Names in configs of earlier revisions, as they are today: a name that is changed in conf/, or in the Python of what conf/ names,
# has a line here, so that runs made before are read.
_KEYS = {"law": "distribution", "time_laws": "time_distributions"}
# The same of methods called BDense...
_BRANCHES = {"weights": "branch_weights", "auxiliary": "branch_auxiliary", "fade": "branch_fade"}
_MOVED = {
    "datamodules.Planar": "datamodules.PlanePoints",
    "lightning_modules.BDenseProgressive": "lightning_modules.ProgressiveDistillation",
    "lightning_modules.BDenseSFD": "lightning_modules.SFD",
    "lightning_modules.BDenseStudent": "lightning_modules.DenoisingStudent",
    "diffusion.time_laws.": "stillhouse.diffusion.time_distributions.",
    "diffusion.": "stillhouse.diffusion.",
    "metrics.": "stillhouse.metrics.",
    "networks.DiffusersFolder": "stillhouse.checkpoints.DiffusersFolder",
    "networks.EDMPickle": "stillhouse.checkpoints.EDMPickle",
    "networks.RectifiedFlowCheckpoint": "stillhouse.checkpoints.RectifiedFlowCheckpoint",
    "networks.": "stillhouse.networks.",
}
# Of a run that has begun these may change: they move its results by rounding at most. config.yaml keeps the first values.
FREE = (
    "trainer.micro_batch",
    "trainer.compile",
    "trainer.channels_last",
    "trainer.benchmark",
    "trainer.profile",
    "logger.tensorboard._target_",
    "data.verify",
)
# What a run writes before its first checkpoint.
_LOGGED = ("metrics.csv", "samples", "tensorboard", "wandb", "wandb_id")
# Options that came after runs had begun, with what those runs had in effect; what their data were packed by stays as it is.
EARLIER = {
    "evaluation.labels": "uniform",
    "callbacks.metrics.labels": "uniform",
    "callbacks.metrics.nfe": None,
    "callbacks.guard.gradients": "stop",
    "data.background": "white",
    "data.class_order": "text",
    "data.depth": "refuse",
    "data.max_aspect": 10,
    "method.branches": 1,
    "method.branch_weights": "uniform",
    "method.branch_auxiliary": None,
    "method.branch_fade": None,
}


def modernised(value: Any) -> Any:
    """A stored config, or a value in it, in plain containers: with each key and `_target_` by its name of today."""
    if isinstance(value, dict):
        branched = str(value.get("_target_")).startswith("lightning_modules.BDense")
        keys = _KEYS | _BRANCHES if branched else _KEYS
        return {keys.get(key, key): _target(v) if key == "_target_" else modernised(v) for key, v in value.items()}
    return [modernised(part) for part in value] if isinstance(value, list) else value


def _target(name: Any) -> Any:
    old = next((old for old in _MOVED if str(name).startswith(old)), None)
    return name if old is None else _MOVED[old] + name[len(old) :]


class RunInUse(ValueError):
    """Another process trains this run."""


class RunFolder:
    """runs/NAME with config.yaml, checkpoints/, metrics.csv, metrics.json and pictures, and a folder for each stage."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.metrics = self.path / "metrics.json"
        self.monitoring = self.path / "monitoring.json"
        self.preparation = self.path / "preparation.json"
        self.pruned = self.path / "pruned.json"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def begun(self) -> bool:
        """Return whether training could be lost, also a stage's: what failed before its first checkpoint may be used again."""
        trained = ("checkpoints/last.ckpt", "*.safetensors")  # of the run and of its stages
        return self.metrics.exists() or any(any(self.path.rglob(pattern)) for pattern in trained)

    def complete(self) -> bool:
        """Return whether the run has reached its end: the final evaluation is written last."""
        return self.metrics.exists()

    def resume(self) -> Path | None:
        """Return the checkpoint that training goes on from, None at the beginning."""
        return self.last if self.last.exists() else None

    def check_complete(self) -> None:
        """Check that the run has reached its end.

        Raises:
            ValueError: Where it has not.
        """
        if not self.complete():
            raise ValueError("it is not complete; the command that started it resumes it")

    def final_records(self) -> list[Record]:
        """Return the records of the final evaluation.

        Raises:
            ValueError: For a run that is not complete, and for damaged records.
        """
        self.check_complete()
        return load_records(resolve_inside(self.path, self.metrics.name))

    def later_records(self, final: Iterable[Record]) -> tuple[list[Record], list[str]]:
        """Return the records that evaluate.py made of the final weights, and a line for each of others, which are left out.

        Others are of a half-trained student, and of another checkpoint than the final evaluation's (`checkpoint=last`).

        Args:
            final: The records of the final evaluation.

        Raises:
            ValueError: For damaged records.
        """
        path = resolve_inside(self.path, "evaluation/metrics.json")
        records = load_records(path) if path.is_file() else []
        steps = {record.weights: record.training["step"] for record in final if record.training}

        def other(record: Record) -> bool:
            at = record.training
            return at is not None and (record.unfinished or at["step"] != steps.get(record.weights, at["step"]))

        left_out = {f"{r.training['step']} of {r.training['total']}": None for r in records if other(r)}
        lines = [f"{path.relative_to(self.path)} has values after {at} training steps, left out" for at in left_out]
        return [record for record in records if not other(record)], lines

    def results_table(self) -> str:
        """Return the table of the final evaluation."""
        return records_text(self.final_records())

    def stored_config(self) -> dict[str, Any]:
        """Return the plain values of config.yaml, to the letter as train.py wrote them.

        Raises:
            FileNotFoundError: Where the folder holds no run.
            ValueError: For a config that can't be read or is none of a run, and for one with interpolations: those of a stranger
                could show this machine's environment.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} holds no run (no config.yaml); give a folder that train.py made")
        resolve_inside(self.path, self.config.name)
        try:
            check_aliases(self.config.read_text())
            plain = OmegaConf.to_container(OmegaConf.load(self.config))
            interpolation = re.search(r"\$\{[^}]*\}?", json.dumps(plain))
        except Exception as error:
            reason = str(error) if type(error) is ValueError else type(error).__name__
            raise ValueError(f"{self.config} can't be read ({reason}); restore or remove it") from error
        if interpolation:
            raise ValueError(
                f"{self.config} holds {interpolation[0]}, which is not resolved: the config of a run has plain values; "
                "put one there"
            )
        if odd := _odd(plain):
            raise ValueError(f"{self.config} is not the config of a run ({odd}); restore or remove it")
        return plain

    def plain_config(self) -> dict[str, Any]:
        """Return the stored values, with the names of earlier revisions as they are today.

        Raises:
            ValueError, FileNotFoundError: As `stored_config`.
        """
        return modernised(self.stored_config())

    def read_config(self) -> DictConfig:
        """Return `plain_config` as a config."""
        return OmegaConf.create(self.plain_config())

    def check(self, config: dict[str, Any]) -> None:
        """Check that a run of this config may begin or go on here.

        Raises:
            ValueError: Where a run with another config is here, with the first difference and both values, and where there is a
                config.yaml of something else.
            OSError: Where a run that is not complete could not be written to.
        """
        outer = next(
            (p for p in self.path.parents if (p / "checkpoints").is_dir() and (p / "config.yaml").is_file()), None
        )
        if outer is not None:
            raise ValueError(f"{self.path} lies inside a run's folder, {outer}; choose another name=...")
        if not self.complete():
            check_writable(self.config)
            check_writable(self.last)
        if not self.begun():
            if self.config.exists():
                self.read_config()
            return
        if not self.config.exists() and (inner := next(self.path.glob("*/**/config.yaml"), None)):
            raise ValueError(f"{self.path} holds other runs, such as {inner.parent}; choose another name=...")
        stored = self.plain_config()
        if not self.complete() and stored != self.stored_config():
            raise ValueError(
                f"{self.path} was begun by an earlier version, whose checkpoints differ: `git checkout {REVISION}` can "
                "finish it, or choose another name=..."
            )
        changes = differences(stored, config)
        changes = [
            (key, was, now)
            for key, was, now in changes
            if key not in FREE
            and not self._says_where(key, was, now)
            and (was is not None or key not in EARLIER or now != EARLIER[key])
        ]
        if changes:
            (key, was, now), *others = changes
            more = f" (also changed: {', '.join(name for name, *_ in others)})" if others else ""
            raise ValueError(
                f"this run was started with {key}={was!r}, but this command has {key}={now!r}{more}; "
                "choose another name=..., or remove the folder"
            )

    def _says_where(self, key: str, was: Any, now: Any) -> bool:
        """Whether an option that changed says where the run lies and no more: its name, a logger's folder. A run may be moved."""
        inside = isinstance(was, str) and isinstance(now, str) and Path(now).is_relative_to(self.path)
        return key == "name" or (key.startswith("logger.") and inside)

    def checkpoint_owner(self, config: Mapping[str, Any], method: str) -> dict[str, str]:
        """Return the `identity` of this run's checkpoints, or of a stage's: by the config that the run was begun with.

        Args:
            config: The command's, plain, which may have options that came later; of a stage with its own batch size.
            method: The name of what is trained.
        """
        stored = self.stored_config() if self.begun() and self.config.is_file() else config
        return identity({**stored, "batch_size": config.get("batch_size")}, method)

    def claim(self, config: dict[str, Any]) -> None:
        """Write the config of a run that has not begun; that of one that has begun is never touched.

        What an attempt with another config logged here before it ended without a checkpoint is removed: the same files go on.
        """
        if self.begun():
            return
        if self.config.is_file() and self.stored_config() != config:
            stages = [path for path in self.path.glob("*/**/metrics.csv") if not (path.parent / "config.yaml").exists()]
            for path in (*(self.path / name for name in _LOGGED), *stages):
                remove(path)
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)
        write_file(self.config, OmegaConf.to_yaml(OmegaConf.create(config)).encode())

    @contextmanager
    def held(self, config: dict[str, Any]) -> Iterator[None]:
        """`claim` the folder, and keep other processes out: a second job of a sweep, or the same command twice.

        Raises:
            RunInUse: Where another process trains this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        refusal = RunInUse("another process trains this run: wait for it, or choose another name=...")
        with hold_lock(self.path / "lock", refusal):
            self.claim(config)
            yield


def _odd(config: Any) -> str:
    """What a run's config would not hold; nothing where all is well. Of the parts only the method must be there."""
    if not isinstance(config, dict) or not config:
        return "it is empty" if config in ({}, []) else "it is a list"
    if not isinstance(config.get("method"), dict):
        return "it names no method"
    parts = [key for key in ("data", "evaluation", "trainer", "teacher") if not isinstance(config.get(key) or {}, dict)]
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        return f"seed is {seed!r}"
    return f"{parts[0]} is {config[parts[0]]!r:.50}" if parts else ""


def identity(config: Mapping[str, Any], method: str) -> dict[str, str]:
    """Return what a checkpoint says of its run: the method's name, and a hash of the options that its weights come from.

    Args:
        config: The run's, plain; of a stage that of the run which it is a part of.
        method: The name of what is trained; a stage has another method than its run.
    """
    chosen = {key: config.get(key) for key in ("method", "seed", "batch_size")}
    chosen["data"] = (config.get("data") or {}).get("name")
    text = json.dumps(_without_places(chosen), sort_keys=True, default=str)
    return {"method": method, "config": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _without_places(value: Any) -> Any:
    """Without the folders where data lie: a run may be moved."""
    if isinstance(value, Mapping):
        return {str(key): _without_places(part) for key, part in value.items() if key not in ("root", "store")}
    return [_without_places(part) for part in value] if isinstance(value, list) else value


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) of every leaf that differs between two plain configs; absent counts as None.

    Lists of other named configs differ by their names.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    was, now = names_in(old), names_in(new)
    if was is not None and was == now:
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{key}.{i}")]
    if was is not None and now is not None:
        return [(key, was, now)]
    return [] if old == new else [(key, old, new)]

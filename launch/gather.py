"""Stored runs and teachers, read for a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launch.folder import RunFolder
from launch.groups import essence, labels, trained_alike
from metrics.records import Record, load_records, merge_records


@dataclass(frozen=True)
class Measured:
    """A complete run. label: of the runs that differ from it by their seed or number of steps alone.

    final: the records of its final evaluation; records: with those that evaluate.py made of it later.
    """

    path: Path
    config: dict[str, Any]
    seed: int
    label: str
    final: list[Record]
    records: list[Record]

    @property
    def name(self) -> str:
        return RunFolder(self.path).name

    @property
    def student(self) -> Record | None:
        """The first record of the final evaluation's student."""
        return next((record for record in self.final if record.subject == "student"), None)


@dataclass(frozen=True)
class Gathered:
    """teachers: {folder of a teacher that evaluate.py measured: its records}. left_out: a line for each folder, with why."""

    runs: list[Measured]
    teachers: dict[Path, list[Record]]
    left_out: list[str]


def gather(patterns: Sequence[str]) -> Gathered:
    """What lies in the folders that the patterns name; a folder without a run or measurement is passed over.

    Errors: FileNotFoundError where a pattern names nothing of either kind, ValueError where no run is complete.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = [path for path in map(Path, sorted(glob(str(pattern)))) if _holds(path)]
        if not found:
            raise FileNotFoundError(f"run={pattern} names no run (a folder with the config.yaml that train.py writes)")
        paths.update(dict.fromkeys(found))
    stored, teachers, left_out = [], {}, []
    for path in paths:
        try:
            if RunFolder(path).config.is_file():
                stored.append((path, *_read(path)))
            else:
                teachers[path] = load_records(path / "metrics.json")
        except (ValueError, OSError) as error:
            left_out.append(f"{path}: {' '.join(str(error).split())}")
    if not stored:
        raise ValueError("\n".join(["no complete run for a report", *left_out]))
    groups = labels([trained_alike(essence(config)) for _, config, _, _ in stored])
    runs = [
        Measured(path, config, int(config.get("seed", 0)), group, final, merge_records(final, again))
        for (path, config, final, again), group in zip(stored, groups, strict=True)
    ]
    return Gathered(runs, teachers, left_out)


def _holds(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.json").is_file()


def _read(path: Path) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """(config, final records, later ones). Errors: ValueError for a run that is not complete or is damaged."""
    folder = RunFolder(path)
    config = OmegaConf.to_container(folder.read_config(), resolve=True)
    return config, *folder.records()

"""Stored runs and teachers, read for a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from launch.run.folder import RunFolder
from stillhouse.analysis.config_groups import comparable_options, labels, training_options
from stillhouse.analysis.cost import read_costs
from stillhouse.files import resolve_inside
from stillhouse.metrics.records import Record, load_records, merge_records

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Measured:
    """A complete run. label: of the runs that differ from it by their seed or number of steps alone.

    final: the records of its final evaluation; records: with those that evaluate.py made later, of the final weights.
    costs: see `read_costs`. samples: the PNG of its final ones, else of the last ones on the way.
    """

    path: Path
    config: dict[str, Any]
    seed: int
    label: str
    final: list[Record]
    records: list[Record]
    costs: dict[str, float | None]
    samples: bytes | None

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

    Raises:
        FileNotFoundError: Where a pattern names nothing of either kind.
        ValueError: Where no run is complete.
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
                stored.append(_read(path, left_out))
            else:
                teachers[path] = load_records(resolve_inside(path, "metrics.json"))
        except (ValueError, OSError) as error:
            left_out.append(f"{path}: {' '.join(str(error).split())}")
    if not stored:
        raise ValueError("\n".join(["no complete run for a report", *left_out]))
    groups = labels([training_options(comparable_options(found["config"])) for found in stored])
    runs = [Measured(label=group, **found) for found, group in zip(stored, groups, strict=True)]
    return Gathered(runs, teachers, left_out)


def _holds(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.json").is_file()


def _read(path: Path, left_out: list[str]) -> dict[str, Any]:
    """All of `Measured` but the label; records of half-trained weights are left out, with a line.

    Raises:
        ValueError: For a run that is not complete, or has a damaged file, which it names.
    """
    folder = RunFolder(path)
    config, final = folder.plain_config(), folder.final_records()
    again, unfinished = folder.later_records()
    left_out += [f"{path}: {line}" for line in unfinished]
    return {
        "path": path,
        "config": config,
        "seed": config.get("seed", 0),
        "final": final,
        "records": merge_records(final, again),
        "costs": read_costs(path),
        "samples": _samples(path),
    }


def _samples(folder: Path) -> bytes | None:
    path = resolve_inside(folder, "samples.png")
    if not path.is_file():
        found = max((folder / "samples").glob("*.png"), default=None)  # names are numbers of the same length
        if found is None:
            return None
        path = resolve_inside(folder, str(found.relative_to(folder)))
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{path} is no PNG picture; restore or remove it")
    return content

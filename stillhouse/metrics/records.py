"""Measured values, each with the fingerprint that says what it may be compared with."""

import hashlib
import json
import math
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import write_file

SUBJECTS = ("teacher", "student", "real")
NOTHING = {"measured": "nothing, by evaluation=none"}  # what metrics.json says of a run that ends without a measurement
TRAINING = ("step", "reached", "total")


@dataclass(frozen=True)
class Record:
    """One metric of one subject (student, teacher or real).

    name: the run, the teacher or the data set. nfe: network evaluations per sample (0 for real images).
    mean, std: over `values`, one per block of seeds; std is that of a sample (n - 1), None for a single block.
    images_per_second: sampling alone, all devices together; None for real images.
    fingerprint: what has to be alike before two values may stand side by side, plus "weights", which may differ.
    steps, solver: how it was sampled, where that is a choice. teacher: the name of a student's teacher.
    shift: by how much a fast extractor moves the Frechet distance of the same images, None for an exact one.
    provenance: where it comes from: {"revision": of git, "config": SHA-256 of the run's config.yaml (a teacher: of all that the
    measurement depends on), "weights": hash of the measured weights}; None in files from before it was recorded.
    training: of a run's student, {"step": optimiser steps behind the measured weights, "reached": those behind the run when
    they were measured, "total": those that it was to take}; None in older files, and for students that are kept on the way.
    """

    name: str
    metric: str
    subject: str
    nfe: int
    mean: float
    std: float | None
    values: list[float]
    images_per_second: float | None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    solver: str | None = None
    teacher: str | None = None
    shift: float | None = None
    provenance: dict[str, str | None] | None = None
    training: dict[str, int] | None = None

    def __post_init__(self):
        if self.subject not in SUBJECTS:
            raise ValueError(f"subject must be one of {', '.join(SUBJECTS)}, got {self.subject!r}")
        for key in ("nfe", "std"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.training is not None and set(self.training) != set(TRAINING):
            raise ValueError(f"training must have {', '.join(TRAINING)}, got {', '.join(self.training)}")

    @property
    def unfinished(self) -> bool:
        """Whether training was to go on after this measurement; one that does not say is taken as final."""
        return self.training is not None and self.training["reached"] < self.training["total"]

    @property
    def comparable(self) -> dict[str, Any]:
        """The part of the fingerprint that values in one table have in common: all but the choice of weights."""
        return {key: value for key, value in self.fingerprint.items() if key != "weights"}

    @property
    def comparable_id(self) -> str:
        """The first 8 hex digits of a hash of `comparable`."""
        return comparable_id(self.comparable)

    @property
    def kind(self) -> tuple[str, str]:
        """(metric, `comparable_id`): values of one kind may stand beside each other."""
        return self.metric, self.comparable_id

    @property
    def identity(self) -> tuple:
        """What a new measurement has to share with an old one to take its place."""
        how = json.dumps(self.fingerprint, sort_keys=True)
        return self.name, self.metric, self.subject, self.nfe, self.steps, self.solver, how


def comparable_id(comparable: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()[:8]


def merge_records(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """`old`, with every record that was measured again replaced in its place, then what is new."""
    merged = {record.identity: record for record in old}
    merged.update({record.identity: record for record in new})
    return list(merged.values())


def save_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write the list as JSON, or where it is empty that nothing was measured, whole or not at all."""
    text = json.dumps([asdict(record) for record in records] or NOTHING, indent=2, allow_nan=False)
    write_file(path, (text + "\n").encode())


def load_records(path: str | Path) -> list[Record]:
    """The list in `path`, empty only where it says so; ValueError, naming the file, for damaged JSON or what is no record."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}; measure the run with `python evaluate.py run=...`")
    try:
        entries = parse_json(path.read_bytes())
        if entries == NOTHING:
            return []
        if not isinstance(entries, list) or not entries:
            raise ValueError("it is empty" if entries in ([], {}) else f"it holds a {type(entries).__name__}")
        return [_record(entry) for entry in entries]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no list of metrics ({error}); move it away and measure again"
        ) from error


def rename_old_keys(entry: dict[str, Any]) -> dict[str, Any]:
    """A measured value's entries in a file, under today's names: `provenance` is called `trace` in older files."""
    return {"provenance" if key == "trace" else key: value for key, value in entry.items()}


def _record(entry: Any) -> Record:
    """Errors: ValueError for what is none, naming the first entry that is missing, unknown or of another type."""
    if not isinstance(entry, dict):
        raise ValueError(f"a record is a dict, not {entry!r:.50}")
    entry = rename_old_keys(entry)
    kinds = get_type_hints(Record)
    if unknown := sorted(set(entry) - set(kinds)):
        raise ValueError(f"unknown entries {', '.join(unknown)}")
    for key, value in entry.items():
        if not _fits(value, kinds[key]):
            raise ValueError(f"{key} is {value!r:.50}")
    return Record(**entry)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of an annotation's kind: plain types, lists, dicts of text, and unions of these."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, parts[1]) for one in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return kind is Any or (type(value) is kind if kind is int else isinstance(value, kind))

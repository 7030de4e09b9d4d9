"""Measured values, each with a fingerprint that says what it may be compared with."""

import hashlib
import json
import math
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import write_ordered_json

SUBJECTS = ("teacher", "student", "real")
NOTHING = {"measured": "nothing, by evaluation=none"}  # metrics.json of a run that ends without a measurement
TRAINING = ("step", "reached", "total")


@dataclass(frozen=True)
class Record:
    """One metric of one subject.

    Attributes:
        name: the run, the teacher or the data set.
        metric: its printed name.
        subject: student, teacher or real.
        nfe: network evaluations per sample; 0 for real images.
        mean: over `values`.
        std: of the sample of `values` (n - 1); None for a single block.
        values: one per block of seeds.
        images_per_second: of sampling alone, all devices together; None for real images.
        fingerprint: what has to be equal before two values may stand side by side, and "weights", which may differ.
        steps: of the solver, where that is a choice.
        solver: its name, where that is a choice.
        teacher: the name of a student's teacher.
        shift: by how much a fast extractor changes the Frechet distance of the same images; None for an exact one.
        provenance: where it comes from: {"revision": of git, "config": SHA-256 of the run's config.yaml (for a teacher of all
            that the measurement depends on), "weights": hash of the measured weights}; None where it was not recorded.
        training: of a run's student, {"step": optimiser steps behind the measured weights, "reached": those behind the run when
            they were measured, "total": those that it was to take}; None in older files, and for a student kept on the way.
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
        """Whether training was to go on after this measurement; without that information it counts as final."""
        return self.training is not None and self.training["reached"] < self.training["total"]

    @property
    def weights(self) -> str | None:
        """Which of a student's were measured: an average's name, or raw."""
        return self.fingerprint.get("weights")

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
        """What a new measurement has in common with the old one that it replaces."""
        how = json.dumps(self.fingerprint, sort_keys=True)
        return self.name, self.metric, self.subject, self.nfe, self.steps, self.solver, how


def comparable_id(comparable: dict[str, Any]) -> str:
    """The first 8 hex digits of a hash of the comparable part of a fingerprint."""
    return hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()[:8]


def merge_records(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """The old records, each replaced by its new measurement if there is one, then those that are new."""
    merged = {record.identity: record for record in old}
    merged.update({record.identity: record for record in new})
    return list(merged.values())


def name_student(records: Iterable[Record], name: str) -> list[Record]:
    """The records, those of the student under another name."""
    return [replace(record, name=name) if record.subject == "student" else record for record in records]


def save_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON, whole or not at all; an empty list as the statement that nothing was measured."""
    write_ordered_json(path, [asdict(record) for record in records] or NOTHING)


def load_records(path: str | Path) -> list[Record]:
    """Read the records of a metrics.json; the list is empty only where the file says that nothing was measured.

    Raises:
        FileNotFoundError: without the file.
        ValueError: naming the file, for damaged JSON or what is no record.
    """
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
    """A record from its entries in a file.

    Raises:
        ValueError: naming the first entry that is unknown or of another type.
        TypeError: naming those that are missing.
    """
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

"""A metric against the number of network evaluations (NFE): values of runs and teachers, and their means over seeds."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from stillhouse.metrics.records import Record


@dataclass(frozen=True)
class Point:
    """Where a line passes at `nfe`; std: of a sample (n - 1), None for one value; seeds: the training seeds behind it."""

    nfe: int
    mean: float
    std: float | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Line:
    """Points in order of NFE."""

    label: str
    points: tuple[Point, ...]
    teacher: bool = False


@dataclass(frozen=True)
class Value:
    """The metric of one run, or of one teacher, at one number of evaluations.

    name: the run or the teacher. group: label of the runs that differ from it by their seed (and NFE) alone, or the
    teacher with its solver. seed, weights (the measured copy): None for a teacher. provenance: see `Record.provenance`.
    """

    name: str
    group: str
    seed: int | None
    nfe: int
    mean: float
    weights: str | None
    provenance: dict[str, str | None] | None = None


@dataclass(frozen=True)
class Quality:
    """Values of one metric with one fingerprint; floor: that of real images, where it was measured.

    fingerprint: without the weights, see `Record.comparable`. notes: what a reader has to know beside the numbers.

    Errors: ValueError for two values at one place.
    """

    metric: str
    fingerprint: dict[str, Any]
    values: tuple[Value, ...]
    floor: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if len({(v.group, v.seed, v.nfe) for v in self.values}) != len(self.values):
            raise ValueError("two values of one group have the same seed and NFE; name one of their runs")

    @property
    def counts(self) -> list[int]:
        """Every NFE that occurs, ascending."""
        return sorted({value.nfe for value in self.values})

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """One per group, students first, each otherwise in the order of its first value."""
        groups: dict[str, list[Value]] = {}
        for value in sorted(self.values, key=lambda v: v.seed is None):
            groups.setdefault(value.group, []).append(value)
        return tuple(_line(label, values) for label, values in groups.items())


def _line(label: str, values: list[Value]) -> Line:
    points = []
    for nfe in sorted({value.nfe for value in values}):
        here = sorted((v for v in values if v.nfe == nfe), key=lambda v: v.seed or 0)
        means = [v.mean for v in here]
        # One seed has a spread over blocks of evaluation seeds, but that is another thing and would look like this one.
        std = statistics.stdev(means) if len(means) > 1 else None
        points.append(Point(nfe, statistics.fmean(means), std, tuple(v.seed for v in here if v.seed is not None)))
    return Line(label, tuple(points), teacher=values[0].seed is None)


def teacher_label(record: Record) -> str:
    return f"teacher {record.name} ({record.solver})" if record.solver else f"teacher {record.name}"


def measured_lines(records: Iterable[Record], like: Record) -> tuple[Line, ...]:
    """Lines of the students and teachers among one measurement's records, as far as they compare with `like`.

    std is the spread over blocks of evaluation seeds.
    """
    lines: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.subject != "real" and record.kind == like.kind:
            label = "student" if record.subject == "student" else teacher_label(record)
            lines.setdefault(label, {})[record.nfe] = record
    return tuple(
        Line(label, tuple(Point(nfe, r.mean, r.std) for nfe, r in sorted(found.items())), label != "student")
        for label, found in lines.items()
    )


def to_json(quality: Quality) -> dict[str, Any]:
    """Plain values: under "values" all that the rest is computed from, then every number of the table."""
    return {
        "metric": quality.metric,
        "fingerprint": quality.fingerprint,
        "floor": quality.floor,
        "notes": list(quality.notes),
        "lines": [
            {"label": line.label, "points": [asdict(p) | {"seeds": list(p.seeds)} for p in line.points]}
            for line in quality.lines
        ],
        "values": [asdict(value) for value in quality.values],
    }


def from_json(content: dict[str, Any]) -> Quality:
    """What `to_json` described, from its values; ValueError for anything else."""
    try:
        values = tuple(Value(**value) for value in content["values"])
        return Quality(content["metric"], content["fingerprint"], values, content["floor"], tuple(content["notes"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no comparison of quality against NFE: {error!r}") from error

"""A metric against the number of network evaluations (NFE): values of runs and teachers, and their means over seeds."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from stillhouse.analysis.cost import COST_NAMES, format_cost
from stillhouse.analysis.tables import describe_fingerprint, format_mean_std, markdown_table, text_table
from stillhouse.metrics.records import Record, rename_old_keys


@dataclass(frozen=True)
class QualityPoint:
    """A line's point: the mean at `nfe`, the standard deviation of the sample (None for one value), its training seeds."""

    nfe: int
    mean: float
    std: float | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class QualityLine:
    """The points of a group of runs or of a teacher, in order of NFE."""

    label: str
    points: tuple[QualityPoint, ...]
    teacher: bool = False


@dataclass(frozen=True)
class QualityValue:
    """The metric of one run, or of one teacher, at one number of evaluations.

    Attributes:
        name: of the run or the teacher.
        group: label of the runs that differ from it by their seed (and NFE) alone, or the teacher with its solver.
        seed: of the run; None for a teacher.
        nfe: network evaluations per sample.
        mean: of the metric, over blocks of evaluation seeds.
        weights: which were measured: an average's name, or raw; None for a teacher.
        provenance: see `Record.provenance`.
        costs: of the run's training, see `read_costs`; None where they are not known.
    """

    name: str
    group: str
    seed: int | None
    nfe: int
    mean: float
    weights: str | None
    provenance: dict[str, str | None] | None = None
    costs: dict[str, float | None] | None = None

    @property
    def place(self) -> tuple[str, int | None, int]:
        """What no two values of a table have in common."""
        return self.group, self.seed, self.nfe


@dataclass(frozen=True)
class Quality:
    """Values of one metric that may be compared.

    Attributes:
        metric: its name.
        fingerprint: that all share, without the weights, see `Record.comparable`.
        values: of runs and teachers.
        floor: the value of real images, where it was measured.
        notes: what a reader has to know beside the numbers.

    Raises:
        ValueError: for two values of one group with the same seed and NFE.
    """

    metric: str
    fingerprint: dict[str, Any]
    values: tuple[QualityValue, ...]
    floor: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if len({value.place for value in self.values}) != len(self.values):
            raise ValueError("two values of one group have the same seed and NFE; name one of their runs")

    def with_others(self, others: "Quality") -> "Quality":
        """These values and others, of which one takes the place of that of the same run and NFE.

        A teacher that is a run with values of its own (the student before) has no second line as a teacher.

        Raises:
            ValueError: For another metric or fingerprint, and for another run where one of its group and seed is: a group's label
                tells apart the runs that were compared with it alone.
        """
        if (self.metric, self.fingerprint) != (others.metric, others.fingerprint):
            kinds = [f"{q.metric} of {describe_fingerprint(q.fingerprint)}" for q in (self, others)]
            raise ValueError(f"it has {kinds[0]}, these are {kinds[1]}")
        values = {value.place: value for value in self.values}
        for value in others.values:
            twin = values.get(value.place, value)
            if twin.name != value.name:
                raise ValueError(
                    f"{twin.name} of it and {value.name} of these would both be {value.group!r} of seed {value.seed} with "
                    f"{value.nfe} NFE"
                )
            values[value.place] = value
        runs = {value.name for value in values.values() if value.seed is not None}
        kept = tuple(value for value in values.values() if value.seed is not None or value.name not in runs)
        floor = self.floor if others.floor is None else others.floor
        notes = dict.fromkeys((*self.notes, *others.notes))
        return Quality(self.metric, self.fingerprint, kept, floor, tuple(notes))

    @property
    def counts(self) -> list[int]:
        """Every NFE that occurs, ascending."""
        return sorted({value.nfe for value in self.values})

    def costs(self, group: str, name: str) -> list[float]:
        """One of `COST_NAMES` of the trainings behind a group's values, where it is known."""
        return [v.costs[name] for v in self.values if v.group == group and v.costs and v.costs[name] is not None]

    @cached_property
    def lines(self) -> tuple[QualityLine, ...]:
        """One per group, students first, each otherwise in the order of its first value."""
        groups: dict[str, list[QualityValue]] = {}
        for value in sorted(self.values, key=lambda v: v.seed is None):
            groups.setdefault(value.group, []).append(value)
        return tuple(_line(label, values) for label, values in groups.items())


def _line(label: str, values: list[QualityValue]) -> QualityLine:
    points = []
    for nfe in sorted({value.nfe for value in values}):
        here = sorted((v for v in values if v.nfe == nfe), key=lambda v: v.seed or 0)
        means = [v.mean for v in here]
        # One seed has a spread over blocks of evaluation seeds, but that is another thing and would look like this one.
        std = statistics.stdev(means) if len(means) > 1 else None
        points.append(
            QualityPoint(nfe, statistics.fmean(means), std, tuple(v.seed for v in here if v.seed is not None))
        )
    return QualityLine(label, tuple(points), teacher=values[0].seed is None)


def label_teacher(record: Record) -> str:
    """A teacher's label, with its solver where that is recorded."""
    return f"teacher {record.name} ({record.solver})" if record.solver else f"teacher {record.name}"


def quality_lines(records: Iterable[Record], like: Record) -> tuple[QualityLine, ...]:
    """Lines of the students and teachers among one measurement's records that may be compared with `like`.

    Standard deviations are over blocks of evaluation seeds.
    """
    lines: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.subject != "real" and record.kind == like.kind:
            label = "student" if record.subject == "student" else label_teacher(record)
            lines.setdefault(label, {})[record.nfe] = record
    return tuple(
        QualityLine(
            label, tuple(QualityPoint(nfe, r.mean, r.std) for nfe, r in sorted(found.items())), label != "student"
        )
        for label, found in lines.items()
    )


def quality_to_json(quality: Quality) -> dict[str, Any]:
    """The comparison as plain values: under "values" all that the rest is computed from, and every number of the table."""
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


def quality_from_json(content: dict[str, Any]) -> Quality:
    """The comparison that `quality_to_json` wrote, made from its values.

    Raises:
        ValueError: for anything else.
    """
    try:
        values = tuple(QualityValue(**rename_old_keys(value)) for value in content["values"])
        return Quality(content["metric"], content["fingerprint"], values, content["floor"], tuple(content["notes"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no comparison of quality against NFE: {error!r}") from error


def quality_text(quality: Quality) -> str:
    """The table as aligned plain text under one line, then the fingerprint and notes."""
    lines = [quality_heading(quality), *text_table(quality_rows(quality)), describe_fingerprint(quality.fingerprint)]
    return "\n\n".join(["\n".join(lines), *(f"note: {note}" for note in quality.notes)])


def quality_markdown(quality: Quality) -> str:
    """The same in Markdown."""
    parts = [
        quality_heading(quality),
        "\n".join(markdown_table(quality_rows(quality))),
        describe_fingerprint(quality.fingerprint),
    ]
    notes = "\n".join(f"- {note}" for note in quality.notes)
    return "\n\n".join([*parts, *([notes] if notes else [])])


def quality_heading(quality: Quality) -> str:
    """The line above the table: metric, weights, what the numbers are, and the value of real images."""
    weights = ", ".join(dict.fromkeys(value.weights for value in quality.values if value.weights))
    spread = any(point.std is not None for line in quality.lines for point in line.points)
    mean = "mean ± standard deviation over training seeds" if spread else "one training seed each"
    groups = [line.label for line in quality.lines]
    if any(len(set(quality.costs(group, cost))) > 1 for group in groups for cost in COST_NAMES):
        mean += ", costs as least .. greatest"
    floor = "" if quality.floor is None else f"; real images score {quality.floor:.4g}"
    return f"{quality.metric} against NFE ({weights}): {mean}{floor}"


def quality_rows(quality: Quality) -> list[list[str]]:
    """The table's header and body: a row for each group and teacher, a column for each NFE, and for what a training cost.

    Nothing is marked as best: with a few seeds that would say more than the numbers do.
    """
    body = []
    known = [name for name in COST_NAMES if any(quality.costs(line.label, name) for line in quality.lines)]
    for line in quality.lines:
        seeds = sorted({seed for point in line.points for seed in point.seeds})
        points = {point.nfe: point for point in line.points}
        cells = [_cell(points[nfe], line, seeds) if nfe in points else "–" for nfe in quality.counts]
        cells += [format_cost(quality.costs(line.label, name)) for name in known]
        body.append([line.label, ", ".join(map(str, seeds)) or "–", *cells])
    return [["group", "seeds", *(f"{nfe} NFE" for nfe in quality.counts), *known], *body]


def _cell(point: QualityPoint, line: QualityLine, seeds: list[int]) -> str:
    """0.209 ± 0.012, and which seeds are behind it where those are not all of the row's."""
    fewer = "" if line.teacher or list(point.seeds) == seeds else f" (seed {', '.join(map(str, point.seeds))})"
    return f"{format_mean_std(point.mean, point.std)}{fewer}"

"""The parts of a report, each made by what makes it elsewhere too."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.analysis.compare_convergence import compare_runs, draw_convergence
from stillhouse.analysis.compare_quality import compare_quality, draw_quality
from stillhouse.analysis.config_groups import comparable_options, measuring_difference, options_that_differ
from stillhouse.analysis.convergence import convergence_notes, convergence_tables
from stillhouse.analysis.cost import RunCost, cost_rows, plot_cost
from stillhouse.analysis.quality import quality_heading, quality_rows
from stillhouse.analysis.report_page import Block, Gallery, Heading, Notes, Picture, Section, Table, Text
from stillhouse.analysis.stored_runs import StoredRun
from stillhouse.analysis.tables import describe_fingerprint, group_by_fingerprint, seed_rows
from stillhouse.metrics.records import Record


@dataclass(frozen=True)
class Measured:
    """A complete run.

    Attributes:
        folder: The run's.
        name: Of the folder, see `distinct_names`; that of its student's records too.
        config: Its config, plain.
        seed: Its seed.
        label: Of the runs that differ from it by their seed or number of steps alone.
        final: The records of its final evaluation.
        records: The same with those that evaluate.py made later, of the final weights.
        costs: See `read_costs`.
        samples: The PNG of its final samples, else of the last ones during training.
    """

    folder: StoredRun
    name: str
    config: dict[str, Any]
    seed: int
    label: str
    final: list[Record]
    records: list[Record]
    costs: dict[str, float | None]
    samples: bytes | None

    @property
    def student(self) -> Record | None:
        """The first record of the final evaluation's student."""
        return next((record for record in self.final if record.subject == "student"), None)


@dataclass(frozen=True)
class Gathered:
    """What a report is made of.

    Attributes:
        runs: The complete runs.
        teachers: Folders of teachers that evaluate.py measured, with their records.
        left_out: A line for each folder that is left out, with the reason.
    """

    runs: list[Measured]
    teachers: list[tuple[StoredRun, list[Record]]]
    left_out: list[str]


def sections(gathered: Gathered) -> list[Section]:
    """In the order in which they are read; one without content is left out."""
    parts = {
        "Results": results(gathered),
        "Quality against NFE": quality_against_nfe(gathered),
        "Quality against cost": quality_against_cost(gathered),
        "Convergence": convergence(gathered),
        "Samples": samples(gathered),
        "Differences of configs": differences(gathered),
        "Where the values come from": provenance_rows(gathered),
        "Left out": [Notes(gathered.left_out)] if gathered.left_out else [],
    }
    return [Section(title, blocks) for title, blocks in parts.items() if blocks]


def results(gathered: Gathered) -> list[Block]:
    """One table per fingerprint, seeds together; the single runs folded away."""
    blocks: list[Block] = []
    for line, labelled in _fingerprints(gathered):
        blocks.append(Table(seed_rows(labelled), caption=line))
        runs = [(record.name, seed, record) for _, seed, record in labelled if record.subject == "student"]
        if len(runs) > 1:
            blocks.append(Table(seed_rows(runs), folded="Every run by itself, ± over blocks of evaluation seeds"))
    return blocks


def _fingerprints(gathered: Gathered) -> list[tuple[str, list[tuple[str, int | None, Record]]]]:
    """(what a fingerprint says, all its records with their label and, of students, the seed)."""
    labelled = {
        id(record): (run.label, run.seed, record)
        for run in gathered.runs
        for record in run.records
        if record.subject == "student"
    }
    others = [record for run in gathered.runs for record in run.records if record.subject != "student"]
    others += [record for _, records in gathered.teachers for record in records]
    labelled |= {id(record): (record.name, None, record) for record in others}
    tables = group_by_fingerprint(record for _, _, record in labelled.values())
    return [(line, [labelled[id(record)] for record in records]) for line, records in tables]


def quality_against_nfe(gathered: Gathered) -> list[Block]:
    """For the first metric of each fingerprint that students were measured by."""
    blocks: list[Block] = []
    for like in _first_students(gathered):
        folders = [run.folder for run in gathered.runs if any(record.kind == like.kind for record in run.records)]
        folders += [f for f, records in gathered.teachers if any(record.kind == like.kind for record in records)]
        compared = compare_quality(folders, like=like)
        heading = quality_heading(compared)
        picture = _drawn(partial(draw_quality, quality=compared))
        blocks += [
            Heading(heading),
            Picture(picture, f"Plot: {heading}", "Less is better for fid and kid; bars are one standard deviation."),
            Table(quality_rows(compared), caption=describe_fingerprint(compared.fingerprint)),
            Notes(compared.notes),
        ]
    return blocks


def quality_against_cost(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = []
    for like in _first_students(gathered):
        runs = [
            RunCost(f"{run.label}, {record.nfe} NFE", run.seed, record.mean, run.costs)
            for run in gathered.runs
            for record in run.final
            if record.subject == "student" and record.kind == like.kind
        ]
        if len(runs) < 2 or not any(cost is not None for run in runs for cost in run.costs.values()):
            continue
        picture = _drawn(partial(plot_cost, metric=like.metric, runs=runs))
        blocks += [
            Heading(f"{like.metric} against the cost of training, with all that had to be prepared"),
            Picture(
                picture,
                f"Plot of {like.metric} against images, seconds and network evaluations of training",
                "Faint dots are runs, large ones means over seeds; the table's costs are least .. greatest. "
                "Seconds compare only on one machine.",
            ),
            Table(cost_rows(runs, like.metric), caption=describe_fingerprint(like.comparable)),
        ]
    return blocks


def convergence(gathered: Gathered) -> list[Block]:
    """One comparison for all runs whose curves are measured alike."""
    blocks: list[Block] = []
    waiting = list(gathered.runs)
    while waiting:
        first = comparable_options(waiting[0].config)
        together = [run for run in waiting if measuring_difference(first, comparable_options(run.config)) is None]
        waiting = [run for run in waiting if run not in together]
        blocks += _compared([run.folder for run in together])
    return blocks


def _compared(runs: list[StoredRun]) -> list[Block]:
    """The baseline is the first run's group that has a curve."""
    why = []
    for number, run in enumerate(runs):
        try:
            compare_runs([run])
        except ValueError as error:
            why.append(" ".join(str(error).split()))
            continue
        ordered = [run, *runs[:number], *runs[number + 1 :]]
        comparison = compare_runs(ordered)
        picture = _drawn(partial(draw_convergence, comparison=comparison, runs=ordered))
        (heading, rows), *more = convergence_tables(comparison)
        caption = (
            "Lines: medians over seeds of smoothed curves; bands: from the least to the greatest; dots: measurements."
        )
        return [
            Heading(heading),
            Picture(picture, f"Curves of {comparison.metric} against updates, images and seconds", caption),
            Table(rows),
            *(Table(body, folded=line) for line, body in more),
            Notes(convergence_notes(comparison)),
        ]
    return [Text("No curves to compare."), Notes(why)]


def samples(gathered: Gathered) -> list[Block]:
    """The final grid of each group's first seed at each number of evaluations: the same noise in all of one data set."""
    shown: dict[str, dict[tuple, Picture]] = {}
    for run in sorted(gathered.runs, key=lambda run: run.seed):
        data = str((run.config.get("data") or {}).get("name", "data"))
        if run.samples is None:
            continue
        student = run.student
        how = f"{student.nfe} NFE, {student.metric} {student.mean:.4g}" if student else "not measured"
        picture = Picture(run.samples, f"Final samples of {run.name}", f"{run.label}: {how} ({run.name})")
        shown.setdefault(data, {}).setdefault((run.label, student and student.nfe), picture)
    blocks: list[Block] = [
        Text("Rows share their noise in all pictures of one data set; one seed of each group is shown.")
    ]
    for data, pictures in shown.items():
        blocks += [Heading(data), Gallery(list(pictures.values()))]
    return blocks if shown else []


def differences(gathered: Gathered) -> list[Block]:
    """Options with several values, then, folded away, those that some runs have and others lack."""
    found = options_that_differ([(run.folder.name, run.config) for run in gathered.runs])
    header = ["option", *(run.name for run in gathered.runs)]
    several, lacking = [], []
    for key, values in found.items():
        row = [key, *("–" if value is None else value for value in values)]
        (several if len(set(values) - {None}) > 1 else lacking).append(row)
    blocks: list[Block] = [Table([header, *several], words=True)] if several else []
    if lacking:
        blocks.append(Table([header, *lacking], words=True, folded=f"{len(lacking)} options that only some runs have"))
    return [Text("Only options in which runs differ; – where a run has none."), *blocks] if blocks else []


def provenance_rows(gathered: Gathered) -> list[Block]:
    rows = [["run", "git revision", "config.yaml (SHA-256)", "student's weights (hash)", "of training step"]]
    for run in gathered.runs:
        provenance: dict[str, Any] = (run.student and run.student.provenance) or {}
        training = run.student and run.student.training
        step = f"{training['step']} of {training['total']}" if training else "unknown"
        rows.append([run.name, *(provenance.get(key) or "unknown" for key in ("revision", "config", "weights")), step])
    return [Table(rows, caption="As the final evaluation found them.", words=True)]


def _first_students(gathered: Gathered) -> list[Record]:
    """Of each fingerprint the first record of a student, which names the metric."""
    found: dict[str, Record] = {}
    for run in gathered.runs:
        for record in run.records:
            if record.subject == "student":
                found.setdefault(record.comparable_id, record)
    return list(found.values())


def _drawn(draw: Callable[[Path], Any]) -> bytes:
    """The PNG that `draw` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return path.read_bytes()

"""Measured folders to a comparison of quality against the number of network evaluations (NFE)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from stillhouse.analysis.config_groups import compared_options, labels, training_options
from stillhouse.analysis.cost import read_costs
from stillhouse.analysis.quality import (
    Quality,
    QualityValue,
    label_teacher,
    quality_lines,
    quality_text,
    quality_to_json,
)
from stillhouse.analysis.quality_plot import plot_quality
from stillhouse.analysis.stored_runs import StoredRun, distinct_names
from stillhouse.analysis.tables import shorten_hash
from stillhouse.files import resolve_inside, write_ordered_json
from stillhouse.metrics.records import Record, load_records


def compare_quality(folders: Sequence[StoredRun], *, like: Record | None = None, weights: str | None = None) -> Quality:
    """Compare the values in metrics.json and evaluation/metrics.json of runs, and in metrics.json of teachers (no config.yaml).

    Runs that differ by their seed or number of steps alone are one group. The notes say what is left out.

    Args:
        folders: Of runs and of measured teachers.
        like: A record of the metric and fingerprint to compare by (None: the first student's).
        weights: The copy to compare where a run has several at one NFE (None: that of its final evaluation).

    Raises:
        FileNotFoundError: For a folder without measurements.
        ValueError: Where no student's value is left.
    """
    notes: list[str] = []
    measured: dict[Path, tuple[list[Record], list[Record]]] = {}
    costs: dict[Path, dict[str, float | None]] = {}
    names = distinct_names(folders)
    for folder in folders:
        try:
            costs[folder.path] = read_costs(folder.path)
            measured[folder.path] = _stored(folder, notes)
        except ValueError as error:
            notes.append(f"{folder.path} left out: {error}")
    like = like or next((r for final, again in measured.values() for r in (*final, *again) if _student(r)), None)
    if like is None:
        raise ValueError("\n".join(["no value of a student; measure runs by evaluate.py run=...", *notes]))

    values: dict[tuple, QualityValue] = {}
    groups = _groups(folders)
    for path, (final, again) in measured.items():
        notes += _unlike(path, "student" if path in groups else "teacher", (*final, *again), like)
        for record in _chosen(final, again, like, weights) if path in groups else ():
            group, seed = groups[path]
            value = QualityValue(
                names[path],
                group,
                seed,
                record.nfe,
                record.mean,
                record.weights,
                record.provenance,
                costs[path],
            )
            twin = values.setdefault(value.place, value)
            if twin is not value:
                notes.append(f"{path} at {record.nfe} NFE left out: {twin.name} has its configuration, seed and NFE")
    if not values:
        raise ValueError("\n".join([f"no student's {like.metric} with one fingerprint", *notes]))
    everything = [record for final, again in measured.values() for record in (*final, *again)]
    comparable = [record for record in everything if record.kind == like.kind]
    for record in comparable:
        if record.subject == "teacher" and record.name not in names.values():  # else it has a student's line
            value = QualityValue(
                record.name, label_teacher(record), None, record.nfe, record.mean, None, record.provenance
            )
            twin = values.setdefault(value.place, value)
            if twin.mean != value.mean:
                notes.append(
                    f"{value.group} at {value.nfe} NFE has two values, {twin.mean:.4g} and {value.mean:.4g}, perhaps of "
                    "other weights; the second is left out"
                )
    floor = next((record.mean for record in comparable if record.subject == "real"), None)
    return Quality(like.metric, like.comparable, tuple(values.values()), floor, tuple(dict.fromkeys(notes)))


def _stored(folder: StoredRun, notes: list[str]) -> tuple[list[Record], list[Record]]:
    """(records of a run's final evaluation, or of a teacher; those that evaluate.py made of a run's final weights).

    Raises:
        ValueError: For a run that is not complete or for damaged records.
    """
    path = folder.path
    if not folder.config.is_file():
        if not folder.metrics.is_file():
            raise FileNotFoundError(f"{path} holds neither a run nor a measured teacher; give folders that do")
        return load_records(resolve_inside(path, folder.metrics.name)), []
    final = folder.final_records()
    again, unfinished = folder.later_records(final)
    notes += [f"{path}: {line}" for line in unfinished]
    return final, again


def _groups(folders: Iterable[StoredRun]) -> dict[Path, tuple[str, int]]:
    """Return the runs' labels and seeds."""
    runs = {folder.path: folder for folder in folders if folder.config.is_file()}
    configs = [run.plain_config() for run in runs.values()]
    groups = labels([training_options(options) for options in compared_options(configs)])
    seeds = [config.get("seed", 0) for config in configs]
    return dict(zip(runs, zip(groups, seeds, strict=True), strict=True))


def _student(record: Record) -> bool:
    return record.subject == "student"


def _chosen(final: list[Record], again: list[Record], like: Record, weights: str | None) -> list[Record]:
    """One record of a run's student per NFE, ascending: of `weights`, else of those that its final evaluation took."""
    # By weights, not by `Record.identity`: that has the folder's name, and folders are renamed.
    found: dict[int, dict[str | None, Record]] = {}
    for record in filter(_student, (*final, *again)):
        if record.kind == like.kind:
            found.setdefault(record.nfe, {})[record.weights] = record
    chosen = []
    for nfe, kinds in sorted(found.items()):
        finals = sorted(filter(_student, final), key=lambda record: record.nfe != nfe)
        order = [weights, *(record.weights for record in finals), *kinds]
        chosen.append(kinds[next(kind for kind in order if kind in kinds)])
    return chosen


def _unlike(path: Path, subject: str, records: Iterable[Record], like: Record) -> list[str]:
    """Notes for a folder's values with other fingerprints, unless it has one that compares at the same place."""
    own = [record for record in records if record.subject == subject and record.metric == like.metric]
    if not own:
        return [f"{path} left out: no {like.metric} of a {subject}"]
    present = {(record.solver, record.nfe) for record in own if record.kind == like.kind}
    apart: dict[str, list[int]] = {}
    for record in own:
        if (record.solver, record.nfe) not in present:
            apart.setdefault(_differences(record, like), []).append(record.nfe)
    return [f"{path} at {_listed(counts)} NFE left out: {how}" for how, counts in apart.items()]


def _differences(record: Record, like: Record) -> str:
    """num_samples 200, not 2000"""
    ours, theirs = record.comparable, like.comparable
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} {shorten_hash(ours.get(key))}, not {shorten_hash(theirs.get(key))}" for key in keys)


def _listed(counts: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(counts))))


def write_quality(
    folders: Sequence[StoredRun], target: Path, *, like: Record | None = None, weights: str | None = None
) -> str:
    """Write quality.json and quality.png into the folder `target`.

    Args:
        folders: Of runs and of measured teachers.
        target: The place of the files.
        like: As for `compare_quality`.
        weights: As for `compare_quality`.

    Returns:
        The table, or why there is none.
    """
    try:
        quality = compare_quality(folders, like=like, weights=weights)
    except ValueError as error:
        return f"quality against NFE not compared: {error}"
    write_ordered_json(target / "quality.json", quality_to_json(quality))
    draw_quality(target / "quality.png", quality)
    return f"{quality_text(quality)}\n\n{target}/quality.json and quality.png written"


def draw_quality(path: Path, quality: Quality) -> None:
    """Draw the compared values into `path`."""
    plot_quality(path, quality.metric, quality.lines, floor=quality.floor)


def draw_measured(path: Path, records: Sequence[Record]) -> None:
    """Draw one measurement's records where it was made at several numbers of steps, with its spread over blocks.

    The metric is the first one, of a student where there is one.
    """
    like = next(filter(_student, records), records[0])
    lines = quality_lines(records, like)
    if any(len(line.points) > 1 for line in lines):
        floor = next((r.mean for r in records if r.subject == "real" and r.kind == like.kind), None)
        plot_quality(path, like.metric, lines, floor=floor, spread="blocks of evaluation seeds")

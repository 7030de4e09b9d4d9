"""Files of measured results, collected from run folders, each with the revision and the machine that it comes from."""

import json
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu.all_stages import SHARES
from benchmarks.gpu.report import contents
from benchmarks.measuring import machine
from launch.run.folder import RunFolder
from results.trained import TrainedRuns, read_trained
from stillhouse.analysis.compare_convergence import compare_runs, draw_convergence
from stillhouse.analysis.compare_quality import compare_quality, draw_quality
from stillhouse.analysis.convergence import convergence_to_json
from stillhouse.analysis.flow_chain import flow_chain_to_json, load_flow_chain
from stillhouse.analysis.flow_plot import plot_flow_chain
from stillhouse.analysis.quality import Quality, quality_from_json, quality_to_json
from stillhouse.analysis.stored_runs import distinct_names
from stillhouse.files import write_ordered_json
from stillhouse.metrics.provenance import revision
from stillhouse.metrics.records import Record, load_records, merge_records, name_student

_Measured = TypeVar("_Measured", Quality, TrainedRuns)


def record(target: Path, folders: list[Path]) -> None:
    """Write the records of the runs' metrics.json into `target`."""
    names = distinct_names(map(RunFolder, folders))
    records: list[Record] = []
    for folder, name in names.items():
        records = merge_records(records, name_student(load_records(folder / "metrics.json"), name))
    write_ordered_json(target, {**origin(), "runs": list(names.values()), "records": [vars(r) for r in records]})


def compare(target: Path, folders: list[Path]) -> None:
    """Write how fast the runs converged, as evaluate.py's convergence.json, into `target`, and the picture beside it."""
    runs = [RunFolder(folder) for folder in folders]
    comparison = compare_runs(runs)
    write_ordered_json(target, {**origin(), "comparison": convergence_to_json(comparison)})
    draw_convergence(target.with_suffix(".png"), comparison, runs)


def quality(target: Path, folders: list[Path]) -> None:
    """Add how good the runs are at how many evaluations to the runs in `target`, as evaluate.py's quality.json, and draw all.

    Raises:
        ValueError: As for `compare_quality`, and where those in the target were measured otherwise.
    """
    compared = compare_quality([RunFolder(folder) for folder in folders])
    here = origin()
    if stored := _stored(target):
        compared = _joined(target, quality_from_json(stored["quality"]), compared)
        here["machine"] = "; ".join(dict.fromkeys((*stored["machine"].split("; "), here["machine"])))
    write_ordered_json(target, {**here, "quality": quality_to_json(compared)})
    draw_quality(target.with_suffix(".png"), compared)


def flows(target: Path, measured: Path) -> None:
    """Write a chain of flows, from evaluate.py's flows.json, into `target`, and the picture beside it."""
    chain = load_flow_chain(measured)
    write_ordered_json(target, {**origin(), "flows": flow_chain_to_json(chain)})
    plot_flow_chain(target.with_suffix(".png"), chain)


def gpu(target: Path, folder: Path) -> None:
    """Write the stages that `python -m benchmarks.gpu` wrote into `folder` into `target`.

    Raises:
        ValueError: Where there are none.
    """
    stages = contents(list(SHARES), folder)
    if not stages:
        raise ValueError(f"{folder} holds no stage of `python -m benchmarks.gpu --out {folder}`")
    write_ordered_json(target, {"recorded": {"date": date.today().isoformat(), "commit": revision()}, "stages": stages})


def claims(target: Path, folder: Path) -> None:
    """Add the runs that `python -m benchmarks.evidence` left in `folder` for the papers' claims to those in `target`.

    Raises:
        ValueError: Where there is no such run, and where those of the target are of other data or were measured otherwise.
    """
    here = origin()
    runs = read_trained(folder, here["machine"])
    if stored := _stored(target):
        runs = _joined(target, TrainedRuns.from_json(stored["claims"]), runs)
    write_ordered_json(target, {**here, "machine": "; ".join(runs.machines), "claims": runs.to_json()})


def _stored(target: Path) -> dict[str, Any] | None:
    return json.loads(target.read_text()) if target.exists() else None


def _joined(target: Path, stored: _Measured, new: _Measured) -> _Measured:
    try:
        return stored.with_others(new)
    except ValueError as error:
        raise ValueError(f"{target} can't take these runs: {error}; name another file") from error


def origin() -> dict[str, Any]:
    """The date, the git revision and the machine of a new results file."""
    here = machine()
    return {
        "date": date.today().isoformat(),
        "commit": revision(),
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['gpu'] or 'no GPU'}, torch {here['torch']}",
    }

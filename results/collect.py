"""Files of measured results, collected from run folders, each with the revision and the machine that it comes from."""

from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine
from launch.evaluate.convergence import compare_runs, draw, dumped
from launch.evaluate.flow_measurement import load_chain
from launch.evaluate.quality import compare_quality
from launch.evaluate.quality import draw as draw_quality
from stillhouse.analysis.convergence import convergence_to_json
from stillhouse.analysis.flow_chain import flow_chain_to_json
from stillhouse.analysis.flow_plot import plot_flow_chain
from stillhouse.analysis.quality import quality_to_json
from stillhouse.files import write_file
from stillhouse.metrics.provenance import revision
from stillhouse.metrics.records import Record, load_records, merge_records


def record(target: Path, folders: list[Path]) -> None:
    """Write the records of the runs' metrics.json into `target`."""
    records: list[Record] = []
    for folder in folders:
        records = merge_records(records, load_records(folder / "metrics.json"))
    runs = [folder.name for folder in folders]
    write_file(target, dumped({**origin(), "runs": runs, "records": [vars(r) for r in records]}))


def compare(target: Path, folders: list[Path]) -> None:
    """Write how fast the runs converged, as evaluate.py's convergence.json, into `target`, and the picture beside it."""
    comparison = compare_runs(folders)
    write_file(target, dumped({**origin(), "comparison": convergence_to_json(comparison)}))
    draw(target.with_suffix(".png"), comparison, folders)


def quality(target: Path, folders: list[Path]) -> None:
    """Write how good the runs are at how many evaluations, as evaluate.py's quality.json, into `target`, and the picture."""
    compared = compare_quality(folders)
    write_file(target, dumped({**origin(), "quality": quality_to_json(compared)}))
    draw_quality(target.with_suffix(".png"), compared)


def flows(target: Path, measured: Path) -> None:
    """Write a chain of flows, from evaluate.py's flows.json, into `target`, and the picture beside it."""
    chain = load_chain(measured)
    write_file(target, dumped({**origin(), "flows": flow_chain_to_json(chain)}))
    plot_flow_chain(target.with_suffix(".png"), chain)


def origin() -> dict[str, Any]:
    """The date, the git revision and the machine of a new results file."""
    here = machine()
    return {
        "date": date.today().isoformat(),
        "commit": revision(),
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['gpu'] or 'no GPU'}, torch {here['torch']}",
    }

"""Measured results as files, and the README's tables made from them.

python -m results.readme record results/NAME.json runs/A runs/B     # collect the final records of runs
python -m results.readme compare results/NAME.json runs/A runs/B    # how fast they converged, and results/NAME.png
python -m results.readme quality results/NAME.json runs/A runs/B    # how good at how many evaluations, and the picture
python -m results.readme flows results/NAME.json runs/flows/flows.json    # what evaluate.py flows=... measured
python -m results.readme update                                     # write the tables into README.md
"""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, machine
from benchmarks.run import table
from launch.evaluate.convergence import compare_runs, draw, dumped
from launch.evaluate.flows import load_chain
from launch.evaluate.quality import compare_quality
from launch.evaluate.quality import draw as draw_quality
from results.support import support_table
from stillhouse.analysis.convergence_tables import markdown as comparison_markdown
from stillhouse.analysis.curve_files import from_json, to_json
from stillhouse.analysis.flow_chain import from_json as chain_from_json
from stillhouse.analysis.flow_chain import to_json as chain_to_json
from stillhouse.analysis.flow_picture import draw_flows
from stillhouse.analysis.flow_tables import markdown as flows_markdown
from stillhouse.analysis.quality import from_json as quality_from_json
from stillhouse.analysis.quality import to_json as quality_to_json
from stillhouse.analysis.quality_tables import markdown as quality_markdown
from stillhouse.analysis.tables import markdown
from stillhouse.files import write_file
from stillhouse.metrics.provenance import revision
from stillhouse.metrics.records import Record, load_records, merge_records

_SHOWN_RUNS = 12  # a longer table is folded
SUPPORT = ROOT / "results/support.json"  # made by tests/support_matrix.py
SUPPORT_BEGIN, SUPPORT_END = "<!-- support: made by `python -m results.readme update` -->", "<!-- end of support -->"
BEGIN, END = "<!-- results: made by `python -m results.readme update` -->", "<!-- end of results -->"


def record(target: Path, folders: list[Path]) -> None:
    """Write the records of the runs' metrics.json into `target`, with the commit and the machine that made them."""
    records: list[Record] = []
    for folder in folders:
        records = merge_records(records, load_records(folder / "metrics.json"))
    runs = [folder.name for folder in folders]
    write_file(target, dumped({**origin(), "runs": runs, "records": [vars(r) for r in records]}))


def compare(target: Path, folders: list[Path]) -> None:
    """Write what evaluate.py writes as convergence.json into `target`, with its origin, and the picture beside it."""
    comparison = compare_runs(folders)
    write_file(target, dumped({**origin(), "comparison": to_json(comparison)}))
    draw(target.with_suffix(".png"), comparison, folders)


def quality(target: Path, folders: list[Path]) -> None:
    """Write what evaluate.py writes as quality.json into `target`, with its origin, and the picture beside it."""
    compared = compare_quality(folders)
    write_file(target, dumped({**origin(), "quality": quality_to_json(compared)}))
    draw_quality(target.with_suffix(".png"), compared)


def flows(target: Path, measured: Path) -> None:
    """Write a chain of flows, from evaluate.py's flows.json, into `target`, with its origin, and the picture beside it."""
    chain = load_chain(measured)
    write_file(target, dumped({**origin(), "flows": chain_to_json(chain)}))
    draw_flows(target.with_suffix(".png"), chain)


def origin() -> dict[str, Any]:
    here = machine()
    return {
        "date": date.today().isoformat(),
        "commit": revision(),
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['gpu'] or 'no GPU'}, torch {here['torch']}",
    }


def tables() -> str:
    """One section for every results file: tables of records, of comparisons, and the figures of benchmarks."""
    paths = [path for path in (ROOT / "results").glob("*.json") if path != SUPPORT]
    paths.sort(key=lambda path: (path.stem.startswith("benchmarks"), path.stem))
    return "\n\n".join(section(path) for path in paths)


def section(path: Path) -> str:
    content = json.loads(path.read_text())
    if "records" in content:
        rows = f"{markdown([Record(**entry) for entry in content['records']])}\n\n{_source(path, content)}"
        summary = f"<summary>{path.stem}: {len(content['runs'])} runs</summary>"
        return rows if len(content["runs"]) <= _SHOWN_RUNS else f"<details>{summary}\n\n{rows}\n\n</details>"
    if "comparison" in content:
        return _pictured(
            path, content, "updates, images and seconds", comparison_markdown(from_json(content["comparison"]))
        )
    if "quality" in content:
        return _pictured(path, content, "network evaluations", quality_markdown(quality_from_json(content["quality"])))
    if "flows" in content:
        return _pictured(path, content, "the number of the flow", flows_markdown(chain_from_json(content["flows"])))
    parts = "\n\n".join(table(part) for part in content.values())
    return f"Speed, from `results/{path.name}`, as median (least .. greatest):\n\n```\n{parts}\n```"


def _pictured(path: Path, content: dict[str, Any], against: str, rows: str) -> str:
    picture = f"![Metric against {against}](results/{path.stem}.png)"
    return "\n\n".join([f"**{path.stem}**", picture, rows, _source(path, content)])


def _source(path: Path, content: dict[str, Any]) -> str:
    source = f"From `results/{path.name}`: commit {content['commit'][:7]}, {content['date']}, {content['machine']}"
    entries = measured_entries(content)
    known = sum(entry["provenance"] is not None for entry in entries)
    provenance = (
        f"{known} of {len(entries)} values have their provenance"
        if known
        else "measured before provenance was recorded"
    )
    return f"{source}; {provenance}."


def measured_entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All that was measured in a results file: records, curves, values or flows, each with its `Record.provenance`.

    It is null for what was measured before provenance was recorded.
    """
    flows = content.get("flows", {"flows": [], "distilled": []})
    return [
        *content.get("records", []),
        *content.get("comparison", {"runs": []})["runs"],
        *content.get("quality", {"values": []})["values"],
        *flows["flows"],
        *flows["distilled"],
    ]


def updated(text: str) -> str:
    """The README's text with its table of what works together and its results section made anew."""
    text = _between(
        text, SUPPORT_BEGIN, SUPPORT_END, support_table(json.loads(SUPPORT.read_text()), ROOT / "conf/recipe")
    )
    return _between(text, BEGIN, END, tables())


def _between(text: str, begin: str, end: str, content: str) -> str:
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"README.md has lost the lines {begin!r} and {end!r}")
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def main(arguments: list[str]) -> None:
    readme = ROOT / "README.md"
    match arguments:
        case ["record", target, *folders] if folders:
            record(Path(target), [Path(folder) for folder in folders])
        case ["compare", target, *folders] if folders:
            compare(Path(target), [Path(folder) for folder in folders])
        case ["quality", target, *folders] if folders:
            quality(Path(target), [Path(folder) for folder in folders])
        case ["flows", target, measured]:
            flows(Path(target), Path(measured))
        case ["update"]:
            write_file(readme, updated(readme.read_text()).encode())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The tables of a folder of stages, as Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import NOT_REACHED, Stage, read
from benchmarks.gpu.worker import PASSED, Row
from stillhouse.files import write_file
from stillhouse.metrics.provenance import short_revision


def contents(stages: Sequence[Stage], folder: Path) -> dict[str, Any]:
    """What the files of a folder hold, by stage."""
    found = {stage.name: read(folder, stage) for stage in stages}
    return {name: content for name, content in found.items() if content is not None}


def report(stages: Sequence[Stage], measured: Mapping[str, Any]) -> str:
    """The machine, and the tables of all stages that are in `measured`, as `contents` gives it."""
    parts = [section(stage, measured[stage.name]) for stage in stages if stage.name in measured]
    machine = next(iter(measured.values()))["machine"]
    return "\n\n".join([_machine(machine), *parts]) + "\n"


def write_report(stages: Sequence[Stage], folder: Path) -> str:
    """`report` of a folder, which is also written to report.md there."""
    text = report(stages, contents(stages, folder))
    write_file(folder / "report.md", text.encode())
    return text


def section(stage: Stage, content: dict[str, Any]) -> str:
    """A stage's table, and below it what has no place there: errors, and how much was not reached."""
    lines = [f"**{content['title'][0].upper()}{content['title'][1:]}**", ""]
    rows = content["entries"]
    if not rows:
        return "\n".join([*lines, f"Skipped: {content['skipped']}."])
    reached = [row for row in rows if row["status"] != NOT_REACHED]
    lines += stage.table(reached) if reached else []
    counts = Counter(row["status"] for row in rows)
    commits = dict.fromkeys(short_revision(row.get("commit")) for row in reached)
    lines += ["", f"{', '.join(f'{count} {status}' for status, count in counts.items())}, of {len(rows)} entries."]
    lines += [f"Commit {', '.join(commits)}, {content['date']}."] if reached else []
    failures = [f"- {_failure(row)}" for row in reached if row["status"] != PASSED]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _failure(row: Row) -> str:
    error = f" {row['error']}:" if row.get("error") else ""
    where = f" ({row['where']})" if row.get("where") else ""
    return f"{row['entry']}: {row['status']}.{error} {row.get('message', '')}{where}"


def _machine(machine: dict[str, Any]) -> str:
    card = machine["gpu"] if machine["device"] == "cuda" else f"{machine['cpu']}, a dry run"
    peak = f", bf16 peak {machine['peak_tflops']:g} TFLOP/s by the data sheet" if machine["peak_tflops"] else ""
    memory = f", {machine['memory_gib']} GiB" if "memory_gib" in machine else ""
    return (
        f"{card}{memory}{peak}; torch {machine['torch']}, Lightning {machine['lightning']}, Python {machine['python']}."
    )

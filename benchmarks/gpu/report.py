"""The tables of a folder of stages, as Markdown."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import NOT_REACHED, Stage, read
from benchmarks.gpu.worker import PASSED, Row
from stillhouse.files import write_file


def report(stages: Sequence[Stage], folder: Path) -> str:
    """The tables of all stages that have a file."""
    found = [(stage, content) for stage in stages if (content := read(folder, stage)) is not None]
    parts = [section(stage, content) for stage, content in found]
    return "\n\n".join([*([_machine(found[0][1]["machine"])] if found else []), *parts]) + "\n"


def write_report(stages: Sequence[Stage], folder: Path) -> str:
    """`report`, which is also written to report.md."""
    text = report(stages, folder)
    write_file(folder / "report.md", text.encode())
    return text


def section(stage: Stage, content: dict[str, Any]) -> str:
    """A stage's table, and below it what has no place there: errors, and how much was not reached."""
    lines = [f"## {content['title'][0].upper()}{content['title'][1:]}", ""]
    rows = content["entries"]
    if not rows:
        return "\n".join([*lines, f"Skipped: {content['skipped']}."])
    reached = [row for row in rows if row["status"] != NOT_REACHED]
    lines += stage.table(reached) if reached else []
    counts = Counter(row["status"] for row in rows)
    lines += ["", f"{', '.join(f'{count} {status}' for status, count in counts.items())}, of {len(rows)} entries."]
    lines += [f"- {_failure(row)}" for row in reached if row["status"] != PASSED]
    return "\n".join(lines)


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

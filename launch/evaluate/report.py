"""Stored runs to one page: results, curves, samples and what differs in their configs. Nothing is measured."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from launch.evaluate.gather import gather
from launch.evaluate.report_sections import sections
from stillhouse.analysis.report_page import REPORT_MARK, html_page
from stillhouse.files import check_writable, write_file
from stillhouse.metrics.provenance import revision


def check_target(path: str | Path) -> Path:
    """Errors: ValueError for a name that is not .html, or where something lies that is no report."""
    path = Path(str(path))
    if path.suffix != ".html":
        raise ValueError(f"report={path} is a web page; name it like report=report.html")
    if path.exists() and not (path.is_file() and REPORT_MARK.encode() in path.read_bytes()[:1000]):
        raise ValueError(f"report={path} exists and is no report of this program; choose another name, or move it away")
    check_writable(path)
    return path


def write_report(target: Path, patterns: Sequence[str]) -> str:
    """Write the page, whole or not at all; returns a line that says so. Errors: see `gather` and `check_target`."""
    check_target(target)
    gathered = gather(patterns)
    facts = [
        ("made", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
        ("by", f"git revision {revision() or 'unknown'}"),
        ("read", f"{' '.join(map(str, patterns))}, in {Path.cwd()}"),
        ("runs", f"{len(gathered.runs)}, in {len({run.label for run in gathered.runs})} groups"),
        ("left out", f"{len(gathered.left_out)} (listed at the end)" if gathered.left_out else "none"),
    ]
    text = html_page("Stillhouse report", facts, sections(gathered))
    write_file(target, text.encode())
    left_out = f", {len(gathered.left_out)} left out" if gathered.left_out else ""
    return f"{target} written: {len(gathered.runs)} runs{left_out}"

"""task=report: one page of stored runs, with results, curves, samples and what differs in their configs."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import DictConfig

from launch.evaluate.gather import gather
from launch.evaluate.options import names, path_option
from launch.evaluate.report_sections import sections
from stillhouse.analysis.report_page import REPORT_MARK, html_page
from stillhouse.files import check_writable, write_file
from stillhouse.metrics.provenance import revision


class Options(TypedDict):
    """conf/task/report.yaml."""

    run: Any
    target: Any


def main(cfg: DictConfig) -> None:
    """Write the page `target` of the folders that `run` names, and print a line that says so.

    Raises:
        ValueError: For impossible options, a target that is no report, or where no run is complete.
        OSError: Where the page can't be written, or a pattern names nothing.
    """
    if cfg.run is None:
        raise ValueError("say of which runs: task=report 'run=[runs/*]'")
    print(write_report(path_option(cfg, "target"), names(cfg.run, "run")))


def check_target(path: str | Path) -> Path:
    """Return the path of a page that may be written.

    Raises:
        ValueError: For a name that is not .html, or where something lies that is no report.
        OSError: Where it can't be written.
    """
    path = Path(str(path))
    if path.suffix != ".html":
        raise ValueError(f"target={path} is a web page; name it like target=report.html")
    if path.exists() and not (path.is_file() and REPORT_MARK.encode() in path.read_bytes()[:1000]):
        raise ValueError(f"target={path} exists and is no report of this program; choose another name, or move it away")
    check_writable(path)
    return path


def write_report(target: Path, patterns: Sequence[str]) -> str:
    """Write the page, whole or not at all.

    Args:
        target: The page.
        patterns: Folders of runs and of measured teachers, or patterns of such.

    Returns:
        A line that says what was written.

    Raises:
        ValueError, OSError: As `gather` and `check_target`.
    """
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

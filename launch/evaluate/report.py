"""task=report: one page of stored runs, with results, curves, samples and what differs in their configs."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import DictConfig

from launch.evaluate.options import matching_folders, names, path_option
from launch.run.folder import RunFolder
from stillhouse.analysis.config_groups import compared_options, labels, training_options
from stillhouse.analysis.cost import read_costs
from stillhouse.analysis.report_page import REPORT_MARK, html_page
from stillhouse.analysis.report_sections import Gathered, Measured, sections
from stillhouse.analysis.stored_runs import distinct_names
from stillhouse.files import check_writable, resolve_inside, write_file
from stillhouse.metrics.provenance import revision
from stillhouse.metrics.records import load_records, merge_records, name_student

_PNG = b"\x89PNG\r\n\x1a\n"


def gather(patterns: Sequence[str]) -> Gathered:
    """Read what lies in the folders that the patterns name, but for those without a run or measurement.

    Raises:
        FileNotFoundError: Where a pattern names nothing of either kind.
        ValueError: Where no run is complete.
    """
    stored, teachers, left_out = [], [], []
    for path in matching_folders(patterns, _holds):
        try:
            if RunFolder(path).config.is_file():
                stored.append(_read(path, left_out))
            else:
                teachers.append((RunFolder(path), load_records(resolve_inside(path, "metrics.json"))))
        except (ValueError, OSError) as error:
            left_out.append(f"{path}: {' '.join(str(error).split())}")
    if not stored:
        raise ValueError("\n".join(["no complete run for a report", *left_out]))
    groups = labels(
        [training_options(options) for options in compared_options([values["config"] for values in stored])]
    )
    found = distinct_names(values["folder"] for values in stored)
    runs = [_named(found[values["folder"].path], group, values) for values, group in zip(stored, groups, strict=True)]
    return Gathered(runs, teachers, left_out)


def _named(name: str, label: str, values: dict[str, Any]) -> Measured:
    for key in ("final", "records"):
        values[key] = name_student(values[key], name)
    return Measured(name=name, label=label, **values)


def _holds(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.json").is_file()


def _read(path: Path, left_out: list[str]) -> dict[str, Any]:
    """All of `Measured` but name and label; records of half-trained weights are left out, with a line.

    Raises:
        ValueError: For a run that is not complete, or has a damaged file, which it names.
    """
    folder = RunFolder(path)
    config, final = folder.plain_config(), folder.final_records()
    again, unfinished = folder.later_records(final)
    left_out += [f"{path}: {line}" for line in unfinished]
    return {
        "folder": folder,
        "config": config,
        "seed": config.get("seed", 0),
        "final": final,
        "records": merge_records(final, again),
        "costs": read_costs(path),
        "samples": _samples(path),
    }


def _samples(folder: Path) -> bytes | None:
    path = resolve_inside(folder, "samples.png")
    if not path.is_file():
        newest = max((folder / "samples").glob("*.png"), default=None)  # names are numbers of the same length
        if newest is None:
            return None
        path = resolve_inside(folder, str(newest.relative_to(folder)))
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{path} is no PNG picture; restore or remove it")
    return content


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

"""A sweep over every combination of options, and the table at its end."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from launch.run.names import run_name
from launch.sweep.jobs import Job, Jobs
from stillhouse.analysis.tables import format_mean_std, group_by_fingerprint, markdown_table, text_table
from stillhouse.files import write_file
from stillhouse.metrics.records import Record, load_records

IRRELEVANT = re.compile(r"(plan|download)=|\+*hydra[./]")  # options that leave a sweep's jobs what they are


def run_grid(jobs: Jobs, overrides: Sequence[Sequence[str]], command: Sequence[str]) -> None:
    """Run a job for each of `overrides`, then print their table and keep it in runs/sweep-OPTIONS.md.

    The same `command` again answers for complete jobs at once, resumes what was killed and begins the rest.

    Raises:
        SystemExit: With code 1, after the table, where a job failed.
    """
    pairs = [dict(override.lstrip("+").split("=", 1) for override in one if "=" in override) for one in overrides]
    swept = [key for key in pairs[0] if len({pair.get(key) for pair in pairs}) > 1]
    made = [jobs.job(one, {key: pair[key] for key in swept}) for one, pair in zip(overrides, pairs, strict=True)]
    _check_folders(made)
    try:
        jobs.launch(made)
    finally:  # also where the user stops it
        if not jobs.config.plan:
            options = ",".join(option for option in command if not IRRELEVANT.match(option))
            write_table(made, jobs.folder / f"{run_name('sweep', options)}.md")
    if any(job.error for job in made):
        sys.exit(1)


def _check_folders(jobs: Sequence[Job]) -> None:
    """Check that each job has a folder of its own.

    Raises:
        ValueError: For two jobs in one folder, which a name without what differs would give them.
    """
    owners: dict[Path, Job] = {}
    for job in jobs:
        twin = owners.setdefault(job.folder.path, job)
        if twin is not job:
            keys = [key for key in job.options if job.options[key] != twin.options[key]] or ["an option, given twice"]
            raise ValueError(
                f"two jobs would have the folder {job.folder.path}: their names lack {', '.join(keys)}; leave name=... out, or "
                f"add it there: 'name=NAME-${{{keys[0]}}}'"
            )


def write_table(jobs: Sequence[Job], path: Path, *closing: str) -> None:
    """Print the tables of the jobs and what failed, then the lines of `closing`; in markdown they are kept in `path`."""
    measured = {id(job): record for job in jobs if (record := _measured(job))}
    tables = [table for table in (_rows(jobs, measured), _over_seeds(jobs, measured)) if len(table) > 1]
    notes = [line for line, _ in group_by_fingerprint(measured.values())]
    notes += [f"{job.folder.path} failed: {job.error}" for job in jobs if job.error]
    notes += closing
    write_file(path, "\n\n".join([*("\n".join(markdown_table(table)) for table in tables), *notes, ""]).encode())
    print(
        "\n"
        + "\n\n".join(["\n".join(text_table(table)) for table in tables] + ["\n".join([*notes, f"{path} written"])])
    )
    sys.stdout.flush()


def _measured(job: Job) -> Record | None:
    """The first record of the run's student."""
    if job.state != "complete":
        return None
    return next((record for record in load_records(job.folder.metrics) if record.subject == "student"), None)


def _columns(measured: dict[int, Record]) -> dict[tuple[str, str], str]:
    """{(metric, fingerprint): title}: unlike fingerprints never share a column."""
    kinds = dict.fromkeys(record.kind for record in measured.values())
    several = len(kinds) > len({metric for metric, _ in kinds})
    return {(metric, one): f"{metric} ({one})" if several else metric for metric, one in kinds}


def _rows(jobs: Sequence[Job], measured: dict[int, Record]) -> list[list[str]]:
    columns, swept = _columns(measured), list(dict.fromkeys(key for job in jobs for key in job.options))
    searched = any(job.value is not None for job in jobs) and all("trial" in job.options for job in jobs)
    rows = [["run", "state", *swept, *(["minimised"] if searched else []), "NFE", *columns.values()]]
    for job in jobs:
        record = measured.get(id(job))
        cells = [job.folder.name, job.state, *(job.options.get(key, "–") for key in swept)]
        if searched:
            cells.append("–" if job.value is None else f"{job.value:.4g}")
        values = [
            format_mean_std(record.mean, record.std) if record and record.kind == kind else "–" for kind in columns
        ]
        rows.append([*cells, str(record.nfe) if record else "–", *values])
    return rows


def _over_seeds(jobs: Sequence[Job], measured: dict[int, Record]) -> list[list[str]]:
    """Jobs that differ by their seed alone, where there are two at least: mean and standard deviation over seeds."""
    groups: dict[tuple, list[Record]] = {}
    for job in jobs:
        record = measured.get(id(job))
        if record and "seed" in job.options:
            others = tuple(f"{key}={value}" for key, value in job.options.items() if key != "seed")
            groups.setdefault((others, record.kind, record.nfe), []).append(record)
    columns = _columns(measured)
    rows = [["options", "", "seeds", "NFE", *columns.values()]]
    for (others, measured_kind, nfe), records in groups.items():
        if len(records) > 1:
            means = [record.mean for record in records]
            value = f"{format_mean_std(mean(means), stdev(means))}"
            rows.append([" ".join(others) or "all", "", str(len(means)), str(nfe)])
            rows[-1] += [value if kind == measured_kind else "–" for kind in columns]
    return rows

"""A sweep over every combination of options, and the table at its end."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from hydra.core.override_parser.types import Override

from launch.run.names import run_name
from launch.sweep.jobs import Job, Jobs, curve_on_the_way
from stillhouse.analysis.tables import format_mean_std, group_by_fingerprint, markdown_table, text_table
from stillhouse.files import write_file
from stillhouse.metrics.records import Record, load_records

IRRELEVANT = re.compile(r"(plan|download)=|\+*hydra[./]")  # options that leave a sweep's jobs what they are
_Column = tuple[bool, str, str]  # whether measured on the way, metric, fingerprint of the run's final evaluation


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


def check_values(overrides: Sequence[Override]) -> None:
    """Check that options have lists of values, each of them once.

    Raises:
        ValueError: For what only a search can draw from, and for a value that is given twice, in whatever spelling.
    """
    for override in overrides:
        if not override.is_sweep_override():
            continue
        if not override.is_discrete_sweep():
            raise ValueError(
                f"{override.input_line}: an interval is for a search: add hydra/sweeper=search, or list values, as "
                f"{override.get_key_element()}=A,B"
            )
        values = list(override.sweep_string_iterator())
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"{override.input_line}: a value is given twice, {twice}; both jobs would be the same run")


def _check_folders(jobs: Sequence[Job]) -> None:
    """Check that each job has a folder of its own.

    Raises:
        ValueError: For two jobs in one folder, which a name without what differs would give them.
    """
    owners: dict[Path, Job] = {}
    for job in jobs:
        twin = owners.setdefault(job.folder.path, job)
        if twin is not job:
            keys = [key for key in job.options if job.options[key] != twin.options[key]]
            raise ValueError(
                f"two jobs would have the folder {job.folder.path}: their names lack {', '.join(keys)}; leave name=... out, or "
                f"add it there: 'name=NAME-${{{keys[0]}}}'"
            )


def write_table(jobs: Sequence[Job], path: Path, *closing: str) -> None:
    """Print the tables of the jobs and what failed, then the lines of `closing`; in markdown they are kept in `path`."""
    results = {id(job): result for job in jobs if (result := _result(job))}
    tables = [table for table in (_rows(jobs, results), _over_seeds(jobs, results)) if len(table) > 1]
    notes = [line for line, _ in group_by_fingerprint(result.record for result in results.values())]
    if any(result.watched for result in results.values()):
        notes.append(
            "on the way: what a run's curve ends at, of other seeds than the final evaluation's: to choose a run by"
        )
    notes += [f"{job.folder.path} {job.state}: {job.error}" for job in jobs if job.error]
    notes += closing
    write_file(path, "\n\n".join([*("\n".join(markdown_table(table)) for table in tables), *notes, ""]).encode())
    print(
        "\n"
        + "\n\n".join(["\n".join(text_table(table)) for table in tables] + ["\n".join([*notes, f"{path} written"])])
    )
    sys.stdout.flush()


@dataclass(frozen=True)
class _Result:
    """What a complete run has measured of its student.

    Attributes:
        record: The first of the final evaluation.
        watched: (metric, value) that its curve ends at; None without a curve, and in a search, whose table has it as minimised.
    """

    record: Record
    watched: tuple[str, float] | None

    def means(self) -> dict[_Column, float]:
        """Its values by column."""
        metric, fingerprint = self.record.kind
        on_the_way = {(True, self.watched[0], fingerprint): self.watched[1]} if self.watched else {}
        return on_the_way | {(False, metric, fingerprint): self.record.mean}


def _result(job: Job) -> _Result | None:
    if job.state != "complete":
        return None
    record = next((record for record in load_records(job.folder.metrics) if record.subject == "student"), None)
    if record is None:
        return None
    curve = None if "trial" in job.options else curve_on_the_way(job.folder)
    return _Result(record, (curve.metric, curve.values[-1]) if curve else None)


def _columns(results: Iterable[_Result]) -> dict[_Column, str]:
    """{column: title}, those of values on the way first: unlike fingerprints never share a column."""
    columns = sorted(dict.fromkeys(column for result in results for column in result.means()), key=lambda c: not c[0])
    titles = {}
    for on_the_way, metric, fingerprint in columns:
        alike = [column for column in columns if column[0] == on_the_way]
        title = metric if len(alike) == len({column[1] for column in alike}) else f"{metric} ({fingerprint})"
        if on_the_way:
            title = "on the way" if len(alike) == 1 else f"on the way: {title}"
        titles[on_the_way, metric, fingerprint] = title
    return titles


def _rows(jobs: Sequence[Job], results: dict[int, _Result]) -> list[list[str]]:
    columns, swept = _columns(results.values()), list(dict.fromkeys(key for job in jobs for key in job.options))
    searched = any(job.value is not None for job in jobs) and all("trial" in job.options for job in jobs)
    rows = [["run", "state", *swept, *(["minimised"] if searched else []), "NFE", *columns.values()]]
    for job in jobs:
        cells = [job.folder.name, job.state, *(job.options.get(key, "–") for key in swept)]
        if searched:
            cells.append("–" if job.value is None else f"{job.value:.4g}")
        nfe, texts = "–", {}
        if result := results.get(id(job)):
            nfe, record = str(result.record.nfe), result.record
            texts = {
                column: format_mean_std(value, None if column[0] else record.std)
                for column, value in result.means().items()
            }
        rows.append([*cells, nfe, *(texts.get(column, "–") for column in columns)])
    return rows


def _over_seeds(jobs: Sequence[Job], results: dict[int, _Result]) -> list[list[str]]:
    """Jobs that differ by their seed alone, where there are two at least: mean and standard deviation over seeds."""
    groups: dict[tuple, list[dict[_Column, float]]] = {}
    for job in jobs:
        result = results.get(id(job))
        if result and "seed" in job.options:
            others = tuple(f"{key}={value}" for key, value in job.options.items() if key != "seed")
            groups.setdefault((others, *result.means(), result.record.nfe), []).append(result.means())
    columns = _columns(results.values())
    rows = [["options", "", "seeds", "NFE", *columns.values()]]
    for (others, *_, nfe), seeds in groups.items():
        if len(seeds) > 1:
            values = {column: [one[column] for one in seeds] for column in seeds[0]}
            texts = {column: format_mean_std(mean(means), stdev(means)) for column, means in values.items()}
            row = [" ".join(others) or "all", "", str(len(seeds)), str(nfe)]
            rows.append([*row, *(texts.get(column, "–") for column in columns)])
    return rows

"""Records as tables in plain text and Markdown; values with different fingerprints never share a table."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from stillhouse.metrics.records import SUBJECTS, Record, comparable_id

Labelled = tuple[str, int | None, Record]  # a group of runs that differ by their seed alone (else a name), seed, record


def records_text(records: Iterable[Record]) -> str:
    """Records as aligned plain text: one table per fingerprint, each under a line that names it and what sets it apart."""
    groups = group_by_fingerprint(records)
    if not groups:
        return "nothing was measured, by evaluation=none"
    return "\n\n".join("\n".join([heading, *text_table(_rows(group))]) for heading, group in groups)


def records_markdown(records: Iterable[Record]) -> str:
    """The same tables in Markdown."""
    return "\n\n".join(
        "\n".join([*markdown_table(_rows(group)), "", heading]) for heading, group in group_by_fingerprint(records)
    )


def text_table(rows: list[list[str]]) -> list[str]:
    """Lines of plain text for a header and a body; the first two columns are words and aligned left, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def markdown_table(rows: list[list[str]]) -> list[str]:
    """The same lines in Markdown; a | inside a cell is escaped, and a line break becomes a space."""
    header, *body = ([" ".join(cell.replace("|", r"\|").splitlines()) for cell in row] for row in rows)
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]


def group_by_fingerprint(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Groups of records that may share a table, each with a line that names its fingerprint and what sets it apart."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.comparable_id, []).append(record)
    prints = [group[0].comparable for group in groups.values()]
    keys = dict.fromkeys(key for p in prints for key in p)
    differing = [key for key in keys if len({repr(p.get(key)) for p in prints}) > 1]
    return [(describe_fingerprint(group[0].comparable, differing), group) for group in groups.values()]


def describe_fingerprint(comparable: dict[str, Any], differing: Sequence[str] = ()) -> str:
    """One line on a fingerprint.

    Args:
        comparable: see `Record.comparable`.
        differing: keys by which it differs from others.
    """

    def show(keys: Iterable[str]) -> str:
        return ", ".join(f"{key} {shorten_hash(comparable.get(key))}" for key in keys)

    common = [key for key in comparable if key not in differing]
    text = f"fingerprint {comparable_id(comparable)}"
    if differing:
        text += f", not to be compared with the others: {show(differing)}"
    return f"{text} ({show(common)})" if common else text


def shorten_hash(value: Any) -> str:
    """A value as text, hashes by their first 8 digits."""
    text = str(value)
    return text[:8] if len(text) == 64 else text


def _rows(records: list[Record]) -> list[list[str]]:
    """Header and body; one row per subject, one column per metric."""
    metrics = list(dict.fromkeys(record.metric for record in records))
    subjects: dict[tuple, dict[str, Record]] = {}
    for r in records:
        key = (r.name, r.subject, r.weights, r.nfe, r.steps, r.solver)
        subjects.setdefault(key, {})[r.metric] = r
    order = sorted(subjects.values(), key=lambda row: _rank(next(iter(row.values()))))
    body = []
    for row in order:
        r = next(iter(row.values()))
        values = [format_mean_std(row[metric].mean, row[metric].std) if metric in row else "–" for metric in metrics]
        body.append([r.name, describe_subject(r), str(r.nfe), *values, format_rate(r), _speed_up(r, records)])
    return [["name", "subject", "NFE", *metrics, "images/s", "speed-up"], *body]


def _rank(record: Record) -> tuple:
    return SUBJECTS.index(record.subject), -record.nfe if record.subject == "teacher" else 0


def describe_subject(record: Record) -> str:
    """Such as student (ema_0.999), student (raw, after 6 of 13 training steps), teacher (heun, 10 steps), real."""
    notes = [record.weights if record.subject == "student" else None, record.solver]
    notes.append(f"{record.steps} steps" if record.steps and record.steps > 1 else None)
    if record.unfinished:
        notes.append(f"after {record.training['step']} of {record.training['total']} training steps")
    how = ", ".join(note for note in notes if note)
    return f"{record.subject} ({how})" if how else record.subject


def format_mean_std(mean: float, std: float | None) -> str:
    """Such as 0.209 ± 0.012, with two digits of the standard deviation; four digits of the mean without one."""
    if not std:
        return f"{mean:.4g}"
    decimals = min(max(1 - math.floor(math.log10(std)), 0), 6)
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def format_rate(record: Record) -> str:
    """A record's images per second."""
    rate = record.images_per_second
    return "–" if rate is None else f"{rate:,.{0 if rate >= 100 else 1}f}"


def _speed_up(record: Record, records: list[Record]) -> str:
    """Sampling speed over that of the student's teacher at its most evaluations; nothing where that is ambiguous."""
    teachers = [
        r for r in records if r.subject == "teacher" and r.images_per_second and record.teacher in (None, r.name)
    ]
    if record.subject != "student" or not record.images_per_second or len({r.name for r in teachers}) != 1:
        return "–"
    slowest = max(teachers, key=lambda r: r.nfe)
    return f"{record.images_per_second / slowest.images_per_second:.1f}x"


def seed_rows(labelled: Iterable[Labelled]) -> list[list[str]]:
    """Records of several training seeds in one row: a row for each label, subject and NFE, a column for each metric.

    A cell is mean ± standard deviation over the training seeds where there are several, else over blocks of evaluation seeds;
    of two values of one seed the first counts.

    Args:
        labelled: (label of the group, training seed, record); the records share one fingerprint.

    Returns:
        The table's header and body.
    """
    rows: dict[tuple, dict[str, dict[int | None, Record]]] = {}
    metrics: dict[str, None] = {}
    for label, seed, r in labelled:
        metrics[r.metric] = None
        key = (SUBJECTS.index(r.subject), label, describe_subject(r), r.nfe)
        rows.setdefault(key, {}).setdefault(r.metric, {}).setdefault(seed, r)
    body = [
        _seed_row(key[1], by_metric, list(metrics))
        for key, by_metric in sorted(rows.items(), key=lambda item: item[0][0])
    ]
    return [["group", "subject", "seeds", "NFE", *metrics, "± over", "images/s"], *body]


def _seed_row(label: str, by_metric: dict[str, dict[int | None, Record]], metrics: Sequence[str]) -> list[str]:
    most = max(by_metric.values(), key=len)
    first = next(iter(most.values()))
    cells = []
    for metric in metrics:
        records = list(by_metric.get(metric, {}).values())
        means = [r.mean for r in records]
        std = statistics.stdev(means) if len(means) > 1 else records[0].std if records else None
        cells.append(format_mean_std(statistics.fmean(means), std) if means else "–")
    seeds = sorted(seed for seed in most if seed is not None)
    over = f"{len(most)} training seeds" if len(most) > 1 else f"{len(first.values)} blocks" if first.std else "–"
    rates = [record.images_per_second for record in most.values() if record.images_per_second is not None]
    speed = format_rate(replace(first, images_per_second=statistics.fmean(rates) if rates else None))
    return [label, describe_subject(first), ", ".join(map(str, seeds)) or "–", str(first.nfe), *cells, over, speed]

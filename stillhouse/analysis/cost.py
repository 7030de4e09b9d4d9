"""What a run's training cost, beside how good it became."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.analysis.curve_files import SECONDS, read_numbers, read_preparation, read_rows
from stillhouse.files import inside

COSTS = ("kimg", "seconds", "network evaluations")


@dataclass(frozen=True)
class Priced:
    """One run's value of a metric and its costs by COSTS, None where the run's folder does not say."""

    label: str
    seed: int
    value: float
    costs: dict[str, float | None]


def read_costs(folder: Path) -> dict[str, float | None]:
    """Thousands of images and seconds of training, with those of a preparation, and all network evaluations.

    Errors: ValueError, naming the file, for a damaged one.
    """
    path = inside(folder, "student.json")
    card = read_numbers(path, "kimg", "network_evaluations") if path.is_file() else {}
    preparation = read_preparation(folder)
    kimg, seconds = card.get("kimg"), _seconds(inside(folder, "metrics.csv"))
    return {
        "kimg": None if kimg is None else kimg + preparation.images / 1000,
        "seconds": None if seconds is None else seconds + preparation.seconds,
        "network evaluations": card.get("network_evaluations"),
    }


def cost_rows(runs: Sequence[Priced], metric: str) -> list[list[str]]:
    """Header and body: means over the seeds of each label."""
    body = []
    for label, group in grouped(runs).items():
        cells = [_mean([run.costs[cost] for run in group]) for cost in COSTS]
        seeds = ", ".join(str(run.seed) for run in group)
        body.append([label, seeds, f"{statistics.fmean(run.value for run in group):.4g}", *cells])
    return [["group", "seeds", metric, *COSTS], *body]


def grouped(runs: Sequence[Priced]) -> dict[str, list[Priced]]:
    found: dict[str, list[Priced]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return found


def _mean(costs: Sequence[float | None]) -> str:
    known = [cost for cost in costs if cost is not None]
    if not known:
        return "–"
    mean = statistics.fmean(known)
    return f"{mean:.4g}" if mean < 1000 else f"{mean:,.0f}"


def _seconds(path: Path) -> float | None:
    """Of a metrics.csv."""
    found = [row[SECONDS] for row in read_rows(path) if row.get(SECONDS)] if path.is_file() else []
    try:
        return float(found[-1]) if found else None
    except ValueError as error:
        raise ValueError(f"{path} has {SECONDS} {found[-1]!r:.50}; restore or remove it") from error

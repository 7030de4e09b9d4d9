"""What a run's training cost, beside how good it became."""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metrics.curve_files import SECONDS, read_preparation

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

    Errors: ValueError for a damaged preparation.json.
    """
    card = _card(folder / "student.json")
    preparation = read_preparation(folder)
    kimg, seconds = card.get("kimg"), _seconds(folder / "metrics.csv")
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


def _card(path: Path) -> dict:
    try:
        card = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # a cost that is not known, no reason to leave a measured run out
    return card if isinstance(card, dict) else {}


def _seconds(path: Path) -> float | None:
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        found = [row[SECONDS] for row in csv.DictReader(file) if row.get(SECONDS)]
    return float(found[-1]) if found else None

"""Curves in files: read from a run's folder; a comparison written as JSON and read again."""

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from stillhouse.analysis.convergence import Comparison
from stillhouse.analysis.curve import CURRENCIES, Cost, Curve
from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import inside

_FRECHET = ("fid", "fd_")  # how the metrics begin that curves are of
UPDATES, SECONDS = "progress/student_updates", "speed/training_seconds"


def read_curve(
    folder: str | Path, group: str, seed: int, *, metric: str | None = None, weights: str | None = None
) -> Curve:
    """The curve in a run's metrics.csv, and the cost of its preparation from preparation.json where there is one.

    metric: such as fid_digits_2k (None: the first Frechet distance). weights: an average's name or raw (None: the
    first average, else raw).

    Errors: FileNotFoundError without metrics.csv; ValueError, naming the file, for what can't be compared.
    """
    folder = Path(folder)
    path = inside(folder, "metrics.csv")
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; only runs with logger.csv have curves")
    rows = read_rows(path)
    column = _column(path, list(rows[0]) if rows else [], metric, weights)
    measured = [row for row in rows if row[column]]
    try:
        values = tuple(float(row[column]) for row in measured)
        costs = tuple(Cost(int(float(r[UPDATES])), int(r["nimg"]), float(r[SECONDS])) for r in measured)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} lacks nimg, {UPDATES} or {SECONDS} beside {column}; train that run again") from error
    if len(values) < 2:
        raise ValueError(
            f"{path} has {len(values)} measurements of {column}, but a curve takes at least 2; "
            "lower evaluation.training.every_kimg"
        )
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{path} has a {column} that is not finite; look at the run's samples")
    name, copy = column.split("/", 1)
    return Curve(folder.resolve().name, group, seed, name, copy, values, costs, read_preparation(folder))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Of a metrics.csv; ValueError, naming it, for one that is no table, has no `nimg`, or holds what a broken disk leaves."""
    try:
        text = path.read_text()
        if "\0" in text:
            raise ValueError("it holds zero bytes")
        rows = list(csv.DictReader(text.splitlines()))
        if rows and "nimg" not in rows[0]:
            raise ValueError("it has no column nimg")
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or remove it, which costs the run its curves"
        ) from error
    return rows


def _column(path: Path, columns: list[str], metric: str | None, weights: str | None) -> str:
    if metric is not None and not metric.startswith(_FRECHET):
        raise ValueError(
            f"metric={metric}: convergence is compared by a metric fid... or fd_..., of which less is better"
        )
    curves = curve_columns(columns)
    for column in curves:
        name, copy = column.split("/", 1)
        if metric in (None, name) and weights in (None, copy):
            return column
    asked = f"{metric or 'fid...'}/{weights or 'ema_...'}"
    raise ValueError(f"{path} has no column {asked}; it has {', '.join(curves) or 'no curve of a fid'}")


def curve_columns(columns: Iterable[str]) -> list[str]:
    """Those that hold a curve, averages before the weights as trained, else in order; a run's own curve is the first."""
    curves = [c for c in columns if c.startswith(_FRECHET) and c.partition("/")[2].startswith(("ema_", "raw"))]
    return sorted(curves, key=lambda c: c.endswith("/raw"))


def read_preparation(folder: Path) -> Cost:
    """What a run's preparation.json says; nothing where there was none. ValueError for a damaged one."""
    path = inside(folder, "preparation.json")
    if not path.is_file():
        return Cost()
    stored = read_numbers(path, "steps", "images", "seconds")
    if None in stored.values():
        raise ValueError(f"{path} is damaged or lacks steps, images or seconds; train that run again")
    return Cost(int(stored["steps"]), int(stored["images"]), float(stored["seconds"]))


def read_numbers(path: Path, *keys: str) -> dict[str, float | None]:
    """Those entries of a JSON file, None where one is missing. ValueError, naming the file, for what is damaged or no number."""
    try:
        content = parse_json(path.read_bytes())
        found = {key: content.get(key) for key in keys} if isinstance(content, dict) else {"it": "no dict"}
        for key, value in found.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if value is not None and not number:
                raise ValueError(f"{key} is {value!r:.50}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore or remove it") from error
    return found


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values: under "runs" all that the rest is computed from, then every number of the tables.

    null stands for a threshold not reached, and for a speed-up that is therefore not a number.
    """
    groups, factors = comparison.groups, comparison.thresholds
    runs = [run for label in groups for run in groups[label]]
    speed_ups = [
        comparison.speed_up(label, factor, currency, prepared)
        for factor in factors
        for label in groups
        if label != comparison.baseline
        for prepared in ((False, True) if comparison.prepared else (False,))
        for currency in CURRENCIES
    ]
    return {
        "metric": comparison.metric,
        "smoothing": "trailing median of 3 measurements",
        "baseline": comparison.baseline,
        "thresholds": [{"factor": factor, "value": value} for factor, value in factors.items()],
        "notes": list(comparison.notes),
        "groups": [asdict(comparison.summary(label)) for label in groups],
        "speed_ups": [
            {
                "group": s.group,
                "factor": s.factor,
                "currency": s.currency,
                "with_preparation": s.prepared,
                "pairs": [dict(zip(("seed", "baseline", "group"), pair, strict=True)) for pair in s.pairs],
                "median": _number(s.median),
                "min": _number(min(s.ratios, default=None)),
                "max": _number(max(s.ratios, default=None)),
            }
            for s in speed_ups
        ],
        "runs": [_run(run, factors) for run in runs],
    }


def from_json(content: dict[str, Any]) -> Comparison:
    """The comparison that `to_json` described, from its runs; ValueError for anything else."""
    try:
        curves = [
            Curve(
                **{key: run[key] for key in ("name", "group", "seed", "metric", "weights")},
                values=tuple(run["values"]),
                costs=tuple(Cost(*point) for point in zip(*(run[c] for c in CURRENCIES), strict=True)),
                preparation=Cost(**run["preparation"]),
                provenance=run.get("provenance"),
            )
            for run in content["runs"]
        ]
        return Comparison(tuple(curves), content["baseline"], tuple(content["notes"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no comparison of convergence: {error!r} ") from error


def _run(curve: Curve, thresholds: dict[float, float]) -> dict[str, Any]:
    crossings = [curve.crossing(value) for value in thresholds.values()]
    return {
        **{key: getattr(curve, key) for key in ("name", "group", "seed", "metric", "weights")},
        "provenance": curve.provenance,
        "preparation": asdict(curve.preparation),
        "crossings": [
            {"factor": factor, "cost": asdict(cost) if cost else None}
            for factor, cost in zip(thresholds, crossings, strict=True)
        ],
        "values": list(curve.values),
        **dict(zip(CURRENCIES, map(list, zip(*map(astuple, curve.costs), strict=True)), strict=True)),
    }


def _number(ratio: float | None) -> float | None:
    return ratio if ratio is not None and math.isfinite(ratio) else None

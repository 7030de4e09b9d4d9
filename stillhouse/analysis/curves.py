"""One run's curve: smoothed, its best, and what it cost to reach a threshold; read from a run's folder.

A lower value is a better one.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import resolve_inside
from stillhouse.metrics.records import load_records, rename_old_keys

WINDOW = 3
COST_UNITS = ("updates", "images", "seconds")
_NAMED = ("name", "group", "seed", "metric", "weights")
_FRECHET = ("fid", "fd_")  # prefixes of the metrics that have curves
UPDATES_COLUMN, SECONDS_COLUMN = "progress/student_updates", "speed/training_seconds"


@dataclass(frozen=True)
class Cost:
    """A cost of training: updates of the student (of a preparation: its optimiser steps), images seen, seconds."""

    updates: int = 0
    images: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.updates + other.updates, self.images + other.images, self.seconds + other.seconds)


@dataclass(frozen=True)
class Curve:
    """One run's measurements in order, at least two.

    Attributes:
        name: of the run.
        group: label of the runs that differ from it by their seed alone.
        seed: of the run.
        metric: with its number of samples, such as fid_digits_2k.
        weights: which were measured: an average's name, or raw.
        values: of the metric, finite.
        costs: of training up to each value.
        preparation: cost of the stages before the first update.
        provenance: of the run's final evaluation, see `Record.provenance`.

    Raises:
        ValueError: for fewer than two values, or values that are not finite.
    """

    name: str
    group: str
    seed: int
    metric: str
    weights: str
    values: tuple[float, ...]
    costs: tuple[Cost, ...]
    preparation: Cost = Cost()
    provenance: dict[str, str | None] | None = None

    def __post_init__(self):
        if len(self.values) != len(self.costs) or len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            raise ValueError(
                f"{self.name}: a curve takes two or more finite values of {self.metric}, each with its cost"
            )

    @cached_property
    def smoothed(self) -> tuple[float, ...]:
        """The values' trailing median of three."""
        return trailing_median(self.values)

    @property
    def best(self) -> tuple[float, Cost]:
        """The least smoothed value and the cost at which it was first there."""
        index = min(range(len(self.values)), key=self.smoothed.__getitem__)
        return self.smoothed[index], self.costs[index]

    @property
    def spread(self) -> float:
        """Greatest minus least of the last third of the values (of two at least): how much the run still fluctuates."""
        last = self.values[-max(2, round(len(self.values) / 3)) :]
        return max(last) - min(last)

    def crossing(self, threshold: float, prepared: bool = False) -> Cost | None:
        """The cost at the first measurement whose smoothed value is at or below a threshold; None if there is none.

        Nothing is interpolated, and smoothing lags: on a falling curve the cost is one to two intervals between measurements
        too high, for every group alike, so that a speed-up above two is too small rather than too great.

        Args:
            threshold: of the metric.
            prepared: whether the preparation's cost is added.
        """
        for cost, value in zip(self.costs, self.smoothed, strict=True):
            if value <= threshold:
                return cost + self.preparation if prepared else cost
        return None


def trailing_median(values: Sequence[float]) -> tuple[float, ...]:
    """The trailing median of three; before the first value all count as infinite, and so the first result is infinite.

    It is at or below a threshold exactly where two of the last three values are: one lucky measurement does not count.
    (A running minimum of three would cross the threshold where the curve first does, that is, smooth nothing.)
    """
    padded = [math.inf] * (WINDOW - 1) + list(values)
    return tuple(median(padded[i : i + WINDOW]) for i in range(len(values)))


def curve_to_json(curve: Curve) -> dict[str, Any]:
    """The curve as plain values, its costs by `COST_UNITS`."""
    return {
        **{key: getattr(curve, key) for key in _NAMED},
        "provenance": curve.provenance,
        "preparation": asdict(curve.preparation),
        "values": list(curve.values),
        **dict(zip(COST_UNITS, map(list, zip(*map(astuple, curve.costs), strict=True)), strict=True)),
    }


def curve_from_json(content: dict[str, Any]) -> Curve:
    """The curve that `curve_to_json` made plain.

    Raises:
        KeyError, TypeError: For anything else.
        ValueError: As for `Curve`.
    """
    return Curve(
        **{key: content[key] for key in _NAMED},
        values=tuple(content["values"]),
        costs=tuple(Cost(*point) for point in zip(*(content[unit] for unit in COST_UNITS), strict=True)),
        preparation=Cost(**content["preparation"]),
        provenance=rename_old_keys(content).get("provenance"),
    )


def read_curve(
    folder: str | Path, group: str, seed: int, *, metric: str | None = None, weights: str | None = None
) -> Curve:
    """Read a run's curve from its metrics.csv, and the cost of its preparation from preparation.json where there is one.

    Args:
        folder: of the run.
        group: label of its group.
        seed: of the run.
        metric: such as fid_digits_2k; None: the first Frechet distance.
        weights: an average's name or raw; None: the first average, else raw.

    Raises:
        FileNotFoundError: without metrics.csv.
        ValueError: naming the file, for what can't be compared.
    """
    folder = Path(folder)
    path = resolve_inside(folder, "metrics.csv")
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; only runs with logger.csv have curves")
    rows = read_metrics_csv(path)
    column = _column(path, list(rows[0]) if rows else [], metric, weights)
    measured = [row for row in rows if row[column]]
    try:
        values = tuple(float(row[column]) for row in measured)
        costs = tuple(Cost(int(float(r[UPDATES_COLUMN])), int(r["nimg"]), float(r[SECONDS_COLUMN])) for r in measured)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} lacks nimg, {UPDATES_COLUMN} or {SECONDS_COLUMN} beside {column}; train that run again"
        ) from error
    if len(values) < 2:
        raise ValueError(
            f"{path} has {len(values)} measurements of {column}, but a curve takes at least 2; "
            "lower evaluation.training.every_kimg"
        )
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{path} has a {column} that is not finite; look at the run's samples")
    name, measured_weights = column.split("/", 1)
    return Curve(
        folder.resolve().name, group, seed, name, measured_weights, values, costs, read_preparation_cost(folder)
    )


def read_metrics_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, by column.

    Raises:
        ValueError: naming the file, for one that is no table, has no column `nimg`, or holds zero bytes as a broken disk
            leaves them.
    """
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
    curves = curve_column_names(columns)
    for column in curves:
        name, column_weights = column.split("/", 1)
        if metric in (None, name) and weights in (None, column_weights):
            return column
    asked = f"{metric or 'fid...'}/{weights or 'ema_...'}"
    raise ValueError(f"{path} has no column {asked}; it has {', '.join(curves) or 'no curve of a fid'}")


def curve_column_names(columns: Iterable[str]) -> list[str]:
    """The columns that hold a curve, averages before the trained weights, else in order; the first is a run's default."""
    curves = [c for c in columns if c.startswith(_FRECHET) and c.partition("/")[2].startswith(("ema_", "raw"))]
    return sorted(curves, key=lambda c: c.endswith("/raw"))


def read_preparation_cost(folder: Path) -> Cost:
    """The cost in a run's preparation.json; zero without the file.

    Raises:
        ValueError: naming the file, for a damaged one.
    """
    path = resolve_inside(folder, "preparation.json")
    if not path.is_file():
        return Cost()
    stored = read_json_numbers(path, "steps", "images", "seconds")
    if None in stored.values():
        raise ValueError(f"{path} is damaged or lacks steps, images or seconds; train that run again")
    return Cost(int(stored["steps"]), int(stored["images"]), float(stored["seconds"]))


def read_json_numbers(path: Path, *keys: str) -> dict[str, float | None]:
    """The entries `keys` of a JSON file, None for a missing one.

    Raises:
        ValueError: naming the file, for what is damaged or no number from 0 on.
    """
    try:
        content = parse_json(path.read_bytes())
        numbers = {key: content.get(key) for key in keys} if isinstance(content, dict) else {"it": "no dict"}
        for key, value in numbers.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if value is not None and not number:
                raise ValueError(f"{key} is {value!r:.50}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore or remove it") from error
    return numbers


def reference_lines(path: str | Path) -> dict[str, dict[str, float]]:
    """Return the values of the teacher and of real images in a run's monitoring.json.

    They are of the monitoring seeds, as the curve is: values of other seeds would not be what it approaches.

    Returns:
        Values by metric, with its number of samples, and by label; empty without the file.
    """
    lines: dict[str, dict[str, float]] = {}
    for record in load_records(path) if Path(path).exists() else []:
        count = record.fingerprint.get("num_samples")
        if record.subject in ("teacher", "real") and isinstance(count, int):
            label = f"teacher ({record.nfe} NFE)" if record.subject == "teacher" else "real"
            metric = metric_with_count(record.metric, count)
            lines.setdefault(metric, {})[label] = record.mean
    return lines


def metric_with_count(metric: str, num_samples: int) -> str:
    """Return a metric's name with its number of samples: fid_digits of 1000 is fid_digits_1k."""
    return f"{metric}_{num_samples // 1000}k" if num_samples % 1000 == 0 else f"{metric}_{num_samples}"

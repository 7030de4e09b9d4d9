"""One run's curve: smoothed, its best, and what it cost to reach a threshold. A lower value is a better one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

WINDOW = 3
CURRENCIES = ("updates", "images", "seconds")


@dataclass(frozen=True)
class Cost:
    """What it took: updates of the generator (of a preparation: its optimiser steps), images seen, seconds of training."""

    updates: int = 0
    images: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.updates + other.updates, self.images + other.images, self.seconds + other.seconds)


@dataclass(frozen=True)
class Curve:
    """One run's measurements in order, at least two: `values`, each with the training's cost so far.

    group: label of the runs that differ from it by their seed alone. metric: with its number of samples, fid_digits_2k.
    weights: the measured copy, an average's name or raw. preparation: spent before the first update.
    provenance: of the run's final evaluation, see `Record.provenance`.
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
        return smoothed(self.values)

    @property
    def best(self) -> tuple[float, Cost]:
        """The least smoothed value and the cost at which it was first there."""
        index = min(range(len(self.values)), key=self.smoothed.__getitem__)
        return self.smoothed[index], self.costs[index]

    @property
    def spread(self) -> float:
        """Greatest minus least measurement of the last third (of two at least): how much the run still wanders."""
        last = self.values[-max(2, round(len(self.values) / 3)) :]
        return max(last) - min(last)

    def crossing(self, threshold: float, prepared: bool = False) -> Cost | None:
        """The cost at the first measurement whose smoothed value is at or below `threshold`; None if there is none.

        Nothing is interpolated, and smoothing lags: on a falling curve it is one to two intervals between measurements
        too high, for every group alike, so that a speed-up above two is too small rather than too great.
        prepared: with the preparation's cost.
        """
        for cost, value in zip(self.costs, self.smoothed, strict=True):
            if value <= threshold:
                return cost + self.preparation if prepared else cost
        return None


def smoothed(values: Sequence[float]) -> tuple[float, ...]:
    """Trailing median of three; what precedes the first value counts as infinite, and so the first result is infinite.

    It is at or below a threshold exactly where two of the last three values are: one lucky measurement does not count.
    (A running minimum of three would cross wherever the raw curve first does, that is, smooth nothing.)
    """
    padded = [math.inf] * (WINDOW - 1) + list(values)
    return tuple(median(padded[i : i + WINDOW]) for i in range(len(values)))

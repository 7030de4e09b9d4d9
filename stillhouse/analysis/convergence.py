"""How fast groups of runs converge, and how many times faster one does than another (DisBack, arXiv 2408.15991, sec. 5.2).

Pure arithmetic on measured curves.
"""

import math
from dataclasses import astuple, dataclass
from functools import cached_property
from statistics import median, median_low

from stillhouse.analysis.curve import CURRENCIES, Cost, Curve

FACTORS = (1.0, 1.05, 1.2)


@dataclass(frozen=True)
class SpeedUp:
    """Baseline's cost over the group's at a threshold, for every seed that both have.

    pairs: (seed, baseline's cost, group's cost), None where the threshold was not reached. A pair's ratio is 0 if the
    group did not reach it, whatever the baseline did, and infinite if the baseline alone did not: then the median needs
    no pair left out, and is itself 0 or infinite where it can't be known.
    """

    group: str
    factor: float
    currency: str
    prepared: bool
    pairs: tuple[tuple[int, float | None, float | None], ...]

    @property
    def ratios(self) -> list[float]:
        return [_ratio(baseline, own) for _, baseline, own in self.pairs]

    @property
    def median(self) -> float | None:
        """None without pairs."""
        if not self.pairs:
            return None
        low = median_low(self.ratios)
        return 0.0 if low == 0 else median(self.ratios)  # half of a "not reached" would be no number

    @property
    def not_reached(self) -> int:
        """By the group, in how many pairs."""
        return sum(own is None for _, _, own in self.pairs)

    @property
    def baseline_not_reached(self) -> int:
        """By the baseline alone, in how many pairs."""
        return sum(baseline is None and own is not None for _, baseline, own in self.pairs)


def _ratio(baseline: float | None, own: float | None) -> float:
    if own is None:
        return 0.0
    if baseline is None:
        return math.inf
    return 1.0 if baseline == own else baseline / own if own else math.inf


@dataclass(frozen=True)
class Summary:
    """A group in numbers, each the median over its seeds: see Curve. every: images between two measurements.

    best, final: both of the smoothed curve. spread: of measurements as they are.
    """

    group: str
    seeds: tuple[int, ...]
    every: float
    best: float
    best_updates: float
    final: float
    spread: float


@dataclass(frozen=True)
class Comparison:
    """Curves of one metric against those of the group `baseline`; notes: what a reader has to know beside the numbers.

    Errors: ValueError for curves that can't be compared.
    """

    curves: tuple[Curve, ...]
    baseline: str
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if len(metrics := {curve.metric for curve in self.curves}) != 1:
            raise ValueError(f"curves of different metrics can't be compared: {', '.join(sorted(metrics)) or 'none'}")
        if self.baseline not in self.groups:
            raise ValueError(f"no curve of the baseline {self.baseline}; there are {', '.join(self.groups)}")
        if len({(curve.group, curve.seed) for curve in self.curves}) != len(self.curves):
            raise ValueError("two curves of one group have the same seed; name one of them")

    @property
    def metric(self) -> str:
        return self.curves[0].metric

    @cached_property
    def groups(self) -> dict[str, tuple[Curve, ...]]:
        """Curves by group, the baseline's first, in order of seeds."""
        labels = sorted(dict.fromkeys(c.group for c in self.curves), key=lambda label: label != self.baseline)
        by_seed = sorted(self.curves, key=lambda curve: curve.seed)
        return {label: tuple(c for c in by_seed if c.group == label) for label in labels}

    @property
    def prepared(self) -> bool:
        """Whether any run had a preparation."""
        return any(curve.preparation != Cost() for curve in self.curves)

    @cached_property
    def thresholds(self) -> dict[float, float]:
        """By factor: the factor times the baseline's best, which is the median over its seeds of the best smoothed value."""
        best = median(curve.best[0] for curve in self.groups[self.baseline])
        return {factor: factor * best for factor in FACTORS}

    def summary(self, group: str) -> Summary:
        curves = self.groups[group]
        gaps = [b.images - a.images for c in curves for a, b in zip(c.costs[:-1], c.costs[1:], strict=True)]
        return Summary(
            group,
            tuple(c.seed for c in curves),
            median(gaps),
            *(median(column) for column in zip(*map(_numbers, curves), strict=True)),
        )

    def crossings(self, group: str, factor: float, prepared: bool = False) -> list[Cost | None]:
        """Of the group's seeds in order."""
        return [curve.crossing(self.thresholds[factor], prepared) for curve in self.groups[group]]

    def median_cost(self, group: str, factor: float, prepared: bool = False) -> tuple[float, ...]:
        """(updates, images, seconds), each the median over seeds, infinite where that is not reached."""
        never = (math.inf,) * len(CURRENCIES)
        costs = [astuple(cost) if cost else never for cost in self.crossings(group, factor, prepared)]
        return tuple(median(column) for column in zip(*costs, strict=True))

    def speed_up(self, group: str, factor: float, currency: str, prepared: bool = False) -> SpeedUp:
        """Over the seeds that the group shares with the baseline."""
        costs = {
            label: {
                curve.seed: getattr(cost, currency) if cost else None
                for curve, cost in zip(self.groups[label], self.crossings(label, factor, prepared), strict=True)
            }
            for label in (self.baseline, group)
        }
        shared = [seed for seed in costs[self.baseline] if seed in costs[group]]
        pairs = tuple((seed, costs[self.baseline][seed], costs[group][seed]) for seed in shared)
        return SpeedUp(group, factor, currency, prepared, pairs)


def _numbers(curve: Curve) -> tuple[float, ...]:
    best, cost = curve.best
    return best, cost.updates, curve.smoothed[-1], curve.spread

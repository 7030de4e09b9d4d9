"""How fast groups of runs converge, and how many times faster one does than another (DisBack, arXiv 2408.15991, sec. 5.2).

Arithmetic on measured curves, the JSON file and the tables of a comparison.
"""

import math
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from statistics import median, median_low
from typing import Any

from stillhouse.analysis.curves import COST_UNITS, Cost, Curve, curve_from_json, curve_to_json
from stillhouse.analysis.tables import markdown_table, text_table

FACTORS = (1.0, 1.05, 1.2)
TitledTable = tuple[str, list[list[str]]]


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's cost over the group's at a threshold, for every seed that both have.

    A pair's ratio is 0 if the group did not reach the threshold, whatever the baseline did, and infinite if the baseline alone
    did not. So the median leaves out no pair, and is itself 0 or infinite where it can't be known.

    Attributes:
        group: compared with the baseline.
        factor: of the threshold, see `Comparison.thresholds`.
        currency: updates, images or seconds.
        prepared: whether the preparations' costs are counted.
        pairs: (seed, baseline's cost, group's cost), None where the threshold was not reached.
    """

    group: str
    factor: float
    currency: str
    prepared: bool
    pairs: tuple[tuple[int, float | None, float | None], ...]

    @property
    def ratios(self) -> list[float]:
        """One for each pair."""
        return [_ratio(baseline, cost) for _, baseline, cost in self.pairs]

    @property
    def median(self) -> float | None:
        """Of the ratios; None without pairs."""
        if not self.pairs:
            return None
        low = median_low(self.ratios)
        return 0.0 if low == 0 else median(self.ratios)  # half of a "not reached" would be no number

    @property
    def not_reached(self) -> int:
        """Number of pairs in which the group did not reach the threshold."""
        return sum(cost is None for _, _, cost in self.pairs)

    @property
    def baseline_not_reached(self) -> int:
        """Number of pairs in which the baseline alone did not reach it."""
        return sum(baseline is None and cost is not None for _, baseline, cost in self.pairs)


def _ratio(baseline: float | None, cost: float | None) -> float:
    if cost is None:
        return 0.0
    if baseline is None:
        return math.inf
    return 1.0 if baseline == cost else baseline / cost if cost else math.inf


@dataclass(frozen=True)
class Summary:
    """A group in numbers, each the median over its seeds.

    Attributes:
        group: its label.
        seeds: of its runs.
        every: images between two measurements.
        best: least value of the smoothed curve.
        best_updates: updates at the best value.
        final: last value of the smoothed curve.
        spread: of the unsmoothed values, see `Curve.spread`.
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
    """Curves of one metric against those of one group.

    Attributes:
        curves: of all groups.
        baseline: label of the group that others are compared with.
        notes: what a reader has to know beside the numbers.

    Raises:
        ValueError: for curves that can't be compared.
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
        """With its number of samples."""
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
        """{factor: factor times the baseline's best}; the best is the median over seeds of the best smoothed value."""
        best = median(curve.best[0] for curve in self.groups[self.baseline])
        return {factor: factor * best for factor in FACTORS}

    def summary(self, group: str) -> Summary:
        """The numbers of a group."""
        curves = self.groups[group]
        gaps = [b.images - a.images for c in curves for a, b in zip(c.costs[:-1], c.costs[1:], strict=True)]
        return Summary(
            group,
            tuple(c.seed for c in curves),
            median(gaps),
            *(median(column) for column in zip(*map(_numbers, curves), strict=True)),
        )

    def crossings(self, group: str, factor: float, prepared: bool = False) -> list[Cost | None]:
        """What each of the group's seeds, in order, needed to reach a threshold; None where it did not."""
        return [curve.crossing(self.thresholds[factor], prepared) for curve in self.groups[group]]

    def median_cost(self, group: str, factor: float, prepared: bool = False) -> tuple[float, ...]:
        """(updates, images, seconds) to reach a threshold, each the median over seeds; infinite where that is not reached."""
        never = (math.inf,) * len(COST_UNITS)
        costs = [astuple(cost) if cost else never for cost in self.crossings(group, factor, prepared)]
        return tuple(median(column) for column in zip(*costs, strict=True))

    def speed_up(self, group: str, factor: float, currency: str, prepared: bool = False) -> SpeedUp:
        """How many times less than the baseline a group needs, over the seeds that they share."""
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


def convergence_to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values: under "runs" all that the rest is computed from, and every number of the tables.

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
        for currency in COST_UNITS
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


def convergence_from_json(content: dict[str, Any]) -> Comparison:
    """The comparison that `convergence_to_json` wrote, made from its runs.

    Raises:
        ValueError: for anything else.
    """
    try:
        curves = tuple(curve_from_json(run) for run in content["runs"])
        return Comparison(curves, content["baseline"], tuple(content["notes"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no comparison of convergence: {error!r} ") from error


def _run(curve: Curve, thresholds: dict[float, float]) -> dict[str, Any]:
    crossings = [curve.crossing(value) for value in thresholds.values()]
    return {
        **curve_to_json(curve),
        "crossings": [
            {"factor": factor, "cost": asdict(cost) if cost else None}
            for factor, cost in zip(thresholds, crossings, strict=True)
        ],
    }


def _number(ratio: float | None) -> float | None:
    return ratio if ratio is not None and math.isfinite(ratio) else None


def convergence_text(comparison: Comparison) -> str:
    """A comparison as aligned plain text: tables under one line each, then notes."""
    parts = ["\n".join([heading, *text_table(rows)]) for heading, rows in convergence_tables(comparison)]
    return "\n\n".join([*parts, *(f"note: {note}" for note in convergence_notes(comparison))])


def convergence_markdown(comparison: Comparison) -> str:
    """The same in Markdown, the costs behind the speed-ups folded away."""
    curves, *more = [
        "\n".join([heading, "", *markdown_table(rows)]) for heading, rows in convergence_tables(comparison)
    ]
    folded = [f"<details><summary>Costs</summary>\n\n{cost}\n\n</details>" for cost in more[:1]]
    listed = "\n".join(f"- {note}" for note in convergence_notes(comparison))
    return "\n\n".join([curves, *more[1:], *folded, *([listed] if listed else [])])


def convergence_tables(comparison: Comparison) -> list[TitledTable]:
    """(heading, header and body) of each table: how good each group got; its cost; how many times faster than the baseline."""
    weights = ", ".join(dict.fromkeys(curve.weights for curve in comparison.curves))
    smooth = (
        "medians over seeds; best and final of curves smoothed by a trailing median of 3, spread of their measurements"
    )
    sections = [(f"Convergence of {comparison.metric} ({weights}): {smooth}", convergence_summary_rows(comparison))]
    if len(comparison.groups) > 1:
        cost = "Cost until two of the last three measurements were at or below a threshold: median over seeds"
        speed = (
            f"Times faster than {comparison.baseline}: median over pairs with the same seed (least .. greatest); "
            "0 where the group\nnever got there, ∞ where the baseline alone did not"
        )
        sections += [(cost, _cost_rows(comparison)), (speed, _speed_rows(comparison))]
    return sections


def convergence_summary_rows(comparison: Comparison) -> list[list[str]]:
    """Header and body: how good each group got, and when."""
    header = ["group", "seeds", "kimg between", "best", "at update", "final", "spread of last third"]
    body = []
    for label in comparison.groups:
        s = comparison.summary(label)
        name = f"{label} (baseline)" if label == comparison.baseline and len(comparison.groups) > 1 else label
        best, final, spread = (f"{v:.4g}" for v in (s.best, s.final, s.spread))
        seeds = ", ".join(map(str, s.seeds))
        body.append([name, seeds, _cost(s.every / 1000), best, _cost(s.best_updates), final, spread])
    return [header, *body]


def _cost_rows(comparison: Comparison) -> list[list[str]]:
    body = []
    for factor in comparison.thresholds:
        for label, curves in comparison.groups.items():
            reached = sum(cost is not None for cost in comparison.crossings(label, factor))
            for prepared in _variants(comparison, label):
                updates, images, seconds = comparison.median_cost(label, factor, prepared)
                costs = [_cost(cost) for cost in (updates, images / 1000, seconds)]
                name = f"{label} + preparation" if prepared else label
                body.append([_level(comparison, factor), name, f"{reached} of {len(curves)}", *costs])
    return [["threshold", "group", "seeds there", "updates", "kimg", "seconds"], *body]


def _speed_rows(comparison: Comparison) -> list[list[str]]:
    body = []
    for factor in comparison.thresholds:
        for label in list(comparison.groups)[1:]:
            for prepared in _variants(comparison, label, comparison.baseline):
                cells = [
                    format_speed_up(comparison.speed_up(label, factor, currency, prepared)) for currency in COST_UNITS
                ]
                name = f"{label} + preparation" if prepared else label
                body.append([_level(comparison, factor), name, *cells])
    return [["threshold", "group", "in updates", "in images", "in seconds"], *body]


def _level(comparison: Comparison, factor: float) -> str:
    """0.2891 (best), 0.3035 (best + 5%), where best is the baseline's."""
    more = f" + {factor - 1:.0%}" if factor != 1 else ""
    return f"{comparison.thresholds[factor]:.4g} (best{more})"


def format_speed_up(speed_up: SpeedUp) -> str:
    """A speed-up such as 13.1x (9.8 .. 15), or which side did not reach the threshold where that leaves no number."""
    ratios, seeds = speed_up.ratios, len(speed_up.pairs)
    if speed_up.median is None:
        return "no seed in common"
    if speed_up.median == 0:
        return f"not reached ({speed_up.not_reached} of {seeds} seeds)"
    if math.isinf(speed_up.median):
        return f"baseline not reached ({speed_up.baseline_not_reached} of {seeds} seeds)"
    spread = f" ({_times(min(ratios))} .. {_times(max(ratios))})" if seeds > 1 else ""
    return f"{_times(speed_up.median)}x{spread}"


def convergence_notes(comparison: Comparison) -> list[str]:
    """The comparison's notes, and where measurements were too far apart or seeds have no partner."""
    notes = list(comparison.notes)
    shared = {curve.seed for curve in comparison.groups[comparison.baseline]}
    for label, curves in comparison.groups.items():
        # The second measurement is the first that the trailing median can put below a threshold.
        early = [
            f"{factor:g}x"
            for factor in comparison.thresholds
            if len(comparison.groups) > 1
            and any(cost == run.costs[1] for cost, run in zip(comparison.crossings(label, factor), curves, strict=True))
        ]
        if early:
            notes.append(
                f"{label} was at {', '.join(early)} by its first two measurements and may have been earlier: "
                "lower evaluation.training.every_kimg to see"
            )
        seeds = {curve.seed for curve in curves}
        if seeds != shared:
            alone = ", ".join(map(str, sorted(seeds ^ shared)))
            notes.append(f"{label} and {comparison.baseline} do not share the seeds {alone}, which make no pair")
    return notes


def _variants(comparison: Comparison, *labels: str) -> tuple[bool, ...]:
    """Without the preparations' cost and, where one of the groups had any, with it."""
    prepared = any(curve.preparation != Cost() for label in labels for curve in comparison.groups[label])
    return (False, True) if prepared else (False,)


def _cost(cost: float) -> str:
    if math.isinf(cost):
        return "not reached"
    return f"{cost:,.0f}" if cost >= 1000 or cost == int(cost) else f"{cost:.3g}"


def _times(ratio: float) -> str:
    if ratio in (0, math.inf):
        return "∞" if ratio else "0"
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:#.3g}"

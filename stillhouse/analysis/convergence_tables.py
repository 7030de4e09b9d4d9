"""A comparison of convergence as text: who got how good, at what cost, and how many times faster than the baseline."""

import math

from stillhouse.analysis.convergence import Comparison, SpeedUp
from stillhouse.analysis.curve import CURRENCIES, Cost
from stillhouse.analysis.tables import aligned, piped

Section = tuple[str, list[list[str]]]


def text(comparison: Comparison) -> str:
    """Aligned plain text: tables under one line each, then notes."""
    parts = ["\n".join([heading, *aligned(rows)]) for heading, rows in sections(comparison)]
    return "\n\n".join([*parts, *(f"note: {note}" for note in notes(comparison))])


def markdown(comparison: Comparison) -> str:
    """The same for a README, the costs behind the speed-ups folded away."""
    curves, *more = ["\n".join([heading, "", *piped(rows)]) for heading, rows in sections(comparison)]
    folded = [f"<details><summary>Costs</summary>\n\n{cost}\n\n</details>" for cost in more[:1]]
    listed = "\n".join(f"- {note}" for note in notes(comparison))
    return "\n\n".join([curves, *more[1:], *folded, *([listed] if listed else [])])


def sections(comparison: Comparison) -> list[Section]:
    """(heading, header and body) of each table: who got how good; at what cost; how many times faster than the baseline."""
    copies = ", ".join(dict.fromkeys(curve.weights for curve in comparison.curves))
    smooth = (
        "medians over seeds; best and final of curves smoothed by a trailing median of 3, spread of their measurements"
    )
    sections = [(f"Convergence of {comparison.metric} ({copies}): {smooth}", curve_rows(comparison))]
    if len(comparison.groups) > 1:
        cost = "Cost until two of the last three measurements were at or below a threshold: median over seeds"
        speed = (
            f"Times faster than {comparison.baseline}: median over pairs with the same seed (least .. greatest); "
            "0 where the group\nnever got there, ∞ where the baseline alone did not"
        )
        sections += [(cost, _cost_rows(comparison)), (speed, _speed_rows(comparison))]
    return sections


def curve_rows(comparison: Comparison) -> list[list[str]]:
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
                cells = [speed(comparison.speed_up(label, factor, currency, prepared)) for currency in CURRENCIES]
                name = f"{label} + preparation" if prepared else label
                body.append([_level(comparison, factor), name, *cells])
    return [["threshold", "group", "in updates", "in images", "in seconds"], *body]


def _level(comparison: Comparison, factor: float) -> str:
    """0.2891 (best), 0.3035 (best + 5%), where best is the baseline's."""
    more = f" + {factor - 1:.0%}" if factor != 1 else ""
    return f"{comparison.thresholds[factor]:.4g} (best{more})"


def speed(speed_up: SpeedUp) -> str:
    """13.1x (9.8 .. 15), or which side did not reach the threshold where that leaves no number."""
    ratios, seeds = speed_up.ratios, len(speed_up.pairs)
    if speed_up.median is None:
        return "no seed in common"
    if speed_up.median == 0:
        return f"not reached ({speed_up.not_reached} of {seeds} seeds)"
    if math.isinf(speed_up.median):
        return f"baseline not reached ({speed_up.baseline_not_reached} of {seeds} seeds)"
    spread = f" ({_times(min(ratios))} .. {_times(max(ratios))})" if seeds > 1 else ""
    return f"{_times(speed_up.median)}x{spread}"


def notes(comparison: Comparison) -> list[str]:
    """The comparison's own, and where its measurements were too far apart or its seeds too few to pair."""
    found = list(comparison.notes)
    shared = {curve.seed for curve in comparison.groups[comparison.baseline]}
    for label, curves in comparison.groups.items():
        # Crossed at the second measurement, the first that can tell.
        early = [
            f"{factor:g}x"
            for factor in comparison.thresholds
            if len(comparison.groups) > 1
            and any(cost == run.costs[1] for cost, run in zip(comparison.crossings(label, factor), curves, strict=True))
        ]
        if early:
            found.append(
                f"{label} was at {', '.join(early)} by its first two measurements and may have been earlier: "
                "lower evaluation.training.every_kimg to see"
            )
        seeds = {curve.seed for curve in curves}
        if seeds != shared:
            alone = ", ".join(map(str, sorted(seeds ^ shared)))
            found.append(f"{label} and {comparison.baseline} do not share the seeds {alone}, which make no pair")
    return found


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

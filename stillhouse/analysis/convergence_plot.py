"""convergence.png: a metric against updates, images and seconds, one colour per group of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stillhouse.analysis.convergence import Comparison
from stillhouse.analysis.curves import Cost, Curve
from stillhouse.pictures.plots import legend_below, log_scale, save_figure

_AXES = (("updates of the student", 1), ("kimg", 1000), ("seconds of training", 1))
_LEGEND_LETTERS = 170  # in a line as wide as the figure


def plot_convergence(path: str | Path, comparison: Comparison, references: Mapping[str, float] | None = None) -> Figure:
    """Plot a comparison, one panel each against updates, images and seconds.

    Lines are medians over seeds of the smoothed curves, bands reach from the least to the greatest, dots are single
    measurements. A thin dashed line repeats a group's line, shifted by the cost of its preparation.

    Args:
        path: of the PNG file.
        comparison: what is plotted.
        references: {label: value} of horizontal lines.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for currency, (axes, (label, unit)) in enumerate(zip(panels, _AXES, strict=True)):
        for number, (group, curves) in enumerate(comparison.groups.items()):
            _plot_group(axes, curves, currency, unit, group, f"C{number}")
        _plot_levels(axes, comparison, references or {})
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.25)
    log_scale(panels[0], [value for curve in comparison.curves for value in curve.values])
    panels[0].set_ylabel(f"{comparison.metric}, trailing median of 3")
    handles, labels = panels[0].get_legend_handles_labels()
    legend_below(figure, handles, labels, _LEGEND_LETTERS)
    save_figure(figure, path)
    return figure


def _plot_group(axes: Axes, curves: Sequence[Curve], currency: int, unit: int, label: str, colour: str) -> None:
    x, values = curves_on_common_axis(curves, currency)
    x = x / unit
    middle = np.median(values, axis=0)
    seeds = f", {len(curves)} seeds" if len(curves) > 1 else ""
    axes.plot(x, middle, color=colour, linewidth=2, label=f"{label}{seeds}")
    if len(curves) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    for curve in curves:
        axes.scatter(_costs(curve.costs, currency) / unit, curve.values, s=5, color=colour, alpha=0.35, linewidths=0)
    shift = np.median([astuple(curve.preparation)[currency] for curve in curves]) / unit
    if shift:
        axes.plot(x + shift, middle, color=colour, linewidth=1, linestyle="--", label=f"{label}, with its preparation")


def _plot_levels(axes: Axes, comparison: Comparison, references: Mapping[str, float]) -> None:
    if len(comparison.groups) > 1:
        factors = ", ".join(f"{factor:g}" for factor in comparison.thresholds)
        for number, value in enumerate(comparison.thresholds.values()):
            label = None if number else f"best of {comparison.baseline}, times {factors}"
            axes.axhline(value, color="0.35", linewidth=0.8, linestyle=":", label=label)
    for number, (label, value) in enumerate(references.items()):
        axes.axhline(value, color="black", linewidth=1, linestyle=("-.", (0, (5, 1)))[number % 2], label=label)


def curves_on_common_axis(curves: Sequence[Curve], currency: int) -> tuple[np.ndarray, np.ndarray]:
    """Bring the curves of several seeds to common places on an axis.

    By updates and images these are all places where a seed was measured and every seed has values, which are interpolated
    linearly. Seconds differ from run to run for reasons that are not the method's: there measurement n of all seeds stands at
    the median of its seconds.

    Args:
        curves: of one group.
        currency: 0 updates, 1 images, 2 seconds.

    Returns:
        Places (P,) and smoothed values (seeds, P).
    """
    # The first smoothed value is infinite.
    places = [_costs(curve.costs[1:], currency) for curve in curves]
    values = [np.array(curve.smoothed[1:]) for curve in curves]
    if currency == 2:
        count = min(map(len, values))
        return np.median([p[:count] for p in places], axis=0), np.array([v[:count] for v in values])
    common = np.unique(np.concatenate(places))
    common = common[(common >= max(p[0] for p in places)) & (common <= min(p[-1] for p in places))]
    return common, np.array([np.interp(common, p, v) for p, v in zip(places, values, strict=True)])


def _costs(costs: Sequence[Cost], currency: int) -> np.ndarray:
    return np.array([astuple(cost)[currency] for cost in costs], dtype=float)

"""A metric against what training cost: images, seconds, network evaluations."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from stillhouse.analysis.cost import COSTS, Priced, grouped
from stillhouse.pictures.charts import legend_below, log_scale, save

_LEGEND_LETTERS = 170  # in a line as wide as the figure
_SPAN = 5  # costs further apart stand on a logarithmic axis


def draw_cost(path: str | Path, metric: str, runs: Sequence[Priced]) -> Figure:
    """Draw one panel per cost that any run has, and return the figure.

    Faint dots are runs; a large one is the mean over a label's seeds, with a bar of one standard deviation to either side.
    """
    known = [cost for cost in COSTS if any(run.costs[cost] is not None for run in runs)]
    figure = Figure(figsize=(5 * len(known), 4.6), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, known, strict=True):
        for number, (label, group) in enumerate(grouped(runs).items()):
            priced = [(run.costs[cost], run.value) for run in group if run.costs[cost] is not None]
            colour, marker = f"C{number % 10}", "osD^v"[number // 10 % 5]
            places, values = zip(*priced, strict=True) if priced else ((), ())
            axes.scatter(places, values, s=14, color=colour, marker=marker, alpha=0.35, linewidths=0)
            middle = ([statistics.fmean(places)], [statistics.fmean(values)]) if priced else ([], [])
            spread = [statistics.stdev(values)] if len(values) > 1 else None
            axes.errorbar(
                *middle, spread, color=colour, marker=marker, markersize=7, linestyle="", capsize=3, label=label
            )
        costs = [run.costs[cost] for run in runs if run.costs[cost] is not None]
        if max(costs) > _SPAN * min(costs) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter(lambda x, _: f"{x:,.0f}" if f"{x:e}"[0] in "25" else "")
        else:
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
            axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel({"kimg": "kimg of training", "seconds": "seconds of training"}.get(cost, cost))
        axes.grid(alpha=0.25)
    log_scale(panels[0], [run.value for run in runs])
    panels[0].set_ylabel(metric)
    legend_below(figure, *panels[0].get_legend_handles_labels(), _LEGEND_LETTERS * len(known) // 3)
    save(figure, path)
    return figure

"""What a run's training cost, beside how good it became: a table and a plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stillhouse.analysis.curves import SECONDS_COLUMN, read_json_numbers, read_metrics_csv, read_preparation_cost
from stillhouse.files import resolve_inside
from stillhouse.pictures.plots import legend_below, log_scale, save_figure

COST_NAMES = ("kimg", "seconds", "network evaluations")
_LEGEND_LETTERS = 170  # in a line as wide as the figure
_SPAN = 5  # costs further apart stand on a logarithmic axis


@dataclass(frozen=True)
class RunCost:
    """One run's value of a metric and its costs by COSTS, None where the run's folder does not say."""

    label: str
    seed: int
    value: float
    costs: dict[str, float | None]


def read_costs(folder: Path) -> dict[str, float | None]:
    """Read what a run's training cost, its preparation included: thousands of images, seconds, network evaluations.

    Raises:
        ValueError: naming the file, for a damaged one.
    """
    path = resolve_inside(folder, "student.json")
    card = read_json_numbers(path, "kimg", "network_evaluations") if path.is_file() else {}
    preparation = read_preparation_cost(folder)
    kimg, seconds = card.get("kimg"), _seconds(resolve_inside(folder, "metrics.csv"))
    return {
        "kimg": None if kimg is None else kimg + preparation.images / 1000,
        "seconds": None if seconds is None else seconds + preparation.seconds,
        "network evaluations": card.get("network_evaluations"),
    }


def cost_rows(runs: Sequence[RunCost], metric: str) -> list[list[str]]:
    """A table's header and body: the metric's mean and the least and greatest costs over the seeds of each label."""
    body = []
    for label, group in group_by_label(runs).items():
        cells = [format_cost([run.costs[cost] for run in group]) for cost in COST_NAMES]
        seeds = ", ".join(str(run.seed) for run in group)
        body.append([label, seeds, f"{statistics.fmean(run.value for run in group):.4g}", *cells])
    return [["group", "seeds", metric, *COST_NAMES], *body]


def format_cost(costs: Sequence[float | None]) -> str:
    """The known costs of some runs, 76.8 or 12,345, least .. greatest where they differ; a dash where none is known."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return "–"
    ends = [f"{cost:.4g}" if cost < 1000 else f"{cost:,.0f}" for cost in (min(known), max(known))]
    return " .. ".join(dict.fromkeys(ends))


def group_by_label(runs: Sequence[RunCost]) -> dict[str, list[RunCost]]:
    """The runs of each label, in order."""
    groups: dict[str, list[RunCost]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _seconds(path: Path) -> float | None:
    """Seconds of training in the last row of a metrics.csv that has them."""
    seconds = (
        [row[SECONDS_COLUMN] for row in read_metrics_csv(path) if row.get(SECONDS_COLUMN)] if path.is_file() else []
    )
    try:
        return float(seconds[-1]) if seconds else None
    except ValueError as error:
        raise ValueError(f"{path} has {SECONDS_COLUMN} {seconds[-1]!r:.50}; restore or remove it") from error


def plot_cost(path: str | Path, metric: str, runs: Sequence[RunCost]) -> Figure:
    """Plot a metric against what training cost, one panel for each cost that any run has; returns the figure.

    Faint dots are runs; a large one is the mean over a label's seeds, with a bar of one standard deviation to either side.
    """
    known = [cost for cost in COST_NAMES if any(run.costs[cost] is not None for run in runs)]
    figure = Figure(figsize=(5 * len(known), 4.6), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, known, strict=True):
        for number, (label, group) in enumerate(group_by_label(runs).items()):
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
    save_figure(figure, path)
    return figure

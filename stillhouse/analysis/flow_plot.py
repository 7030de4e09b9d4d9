"""flows.png: along a chain of flows, how far they drift, how straight they are, and how good."""

import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stillhouse.analysis.flow_chain import FlowChain, flow_chain_text, flow_chain_to_json
from stillhouse.analysis.flow_errors import Estimate
from stillhouse.files import write_ordered_json
from stillhouse.pictures.plots import legend_below, log_scale, save_figure

_SIDE = 4.2  # inches
_LETTERS = 40  # of the legend for each panel
_NAME = 14  # letters of a flow's name in a line
_DASHES = ("--", "-.", ":")


def write_flow_chain(chain: FlowChain, folder: Path) -> str:
    """Write flows.json and flows.png into `folder`.

    Args:
        chain: What was measured.
        folder: The place of the files.

    Returns:
        The tables.
    """
    write_ordered_json(folder / "flows.json", flow_chain_to_json(chain))
    plot_flow_chain(folder / "flows.png", chain)
    return f"{flow_chain_text(chain)}\n\n{folder}/flows.json and flows.png written"


def plot_flow_chain(path: str | Path, chain: FlowChain) -> Figure:
    """Plot drifts, straightness and each metric over the number k of the flow, one panel each; returns the figure.

    Bars reach one standard error (drift, straightness), or one standard deviation over blocks of evaluation seeds (a flow's
    distance) or training seeds (students), to either side.
    """
    count = 2 + len(chain.metrics)
    figure = Figure(figsize=(_SIDE * count, _SIDE + 1), layout="constrained")
    drift, bend, *others = figure.subplots(1, count)
    _plot_drift(drift, chain)
    _plot_straightness(bend, chain)
    for axes, metric in zip(others, chain.metrics, strict=True):
        _plot_metric(axes, chain, metric)
    places = range(1, len(chain.flows) + 1)
    titles = [f"{k}\n{_wrap(flow.name)}" for k, flow in zip(places, chain.flows, strict=True)]
    for axes in figure.axes:
        axes.set_xticks(places, titles)
        axes.set(xlim=(0.6, len(chain.flows) + 0.4))
        axes.grid(alpha=0.25)
    entries: dict[str, object] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    legend_below(figure, list(entries.values()), list(entries), _LETTERS * count)
    save_figure(figure, path)
    return figure


def _plot_drift(axes: Axes, chain: FlowChain) -> None:
    places = range(1, len(chain.flows) + 1)
    _line(axes, places, [chain.drifted(k) for k in places], None, "roots of step drifts, added up", "C3", "s")
    ends = [flow.end_drift.root if flow.end_drift else 0.0 for flow in chain.flows]
    errors = [_root_error(flow.end_drift) for flow in chain.flows]
    _line(axes, places, ends, errors, "root of the end-point drift", "C0", "o")
    axes.set(title="drift", ylabel="root of the mean square over all pixels")
    _from_zero(axes, [chain.drifted(len(places)), *ends])


def _root_error(value: Estimate | None) -> float:
    """The standard error of the root: d sqrt(e) = de / (2 sqrt(e))."""
    return value.error / (2 * value.root) if value and value.error and value.mean else 0.0


def _plot_straightness(axes: Axes, chain: FlowChain) -> None:
    places = range(1, len(chain.flows) + 1)
    values = [flow.straightness for flow in chain.flows]
    _line(axes, places, [v.mean for v in values], [v.error or 0.0 for v in values], "straightness S", "C2", "o")
    axes.set(title="straightness, 0: straight", ylabel="S")
    _from_zero(axes, [value.mean + (value.error or 0.0) for value in values])


def _from_zero(axes: Axes, values: Iterable[float]) -> None:
    """From zero to a little above the values; as it is where all are zero."""
    if top := max(values):
        axes.set_ylim(0, 1.08 * top)


def _plot_metric(axes: Axes, chain: FlowChain, metric: str) -> None:
    places = range(1, len(chain.flows) + 1)
    simulated = [flow.simulated[metric] for flow in chain.flows]
    _line(axes, places, [m for m, _ in simulated], [s or 0.0 for _, s in simulated], "whole simulation", "black", "o")
    values = [mean for mean, _ in simulated]
    counts = list(dict.fromkeys(steps for flow in chain.flows for steps in flow.euler))
    for number, steps in enumerate(counts):
        by_euler = [flow.euler[steps][metric] for flow in chain.flows]
        label = f"{steps} Euler step{'s' if steps > 1 else ''}"
        dash = _DASHES[number % len(_DASHES)]
        _line(axes, places, [m for m, _ in by_euler], [s or 0.0 for _, s in by_euler], label, "0.5", "^", dash)
        values += [mean for mean, _ in by_euler]
    for number, (group, runs) in enumerate(chain.groups().items()):
        means = {k: [run.scores[metric][0] for run in here] for k, here in runs.items()}
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in means.values()]
        _line(axes, means, [statistics.fmean(v) for v in means.values()], spreads, group, f"C{4 + number % 6}", "D")
        values += [value for here in means.values() for value in here]
    floor = chain.floor[metric][0]
    axes.axhline(floor, color="black", linewidth=1, linestyle=":", label="real images")
    log_scale(axes, [*values, floor])
    axes.set(title=metric, ylabel=metric)


def _line(
    axes: Axes,
    places: Iterable[int],
    values: Iterable[float],
    errors: Iterable[float] | None,
    label: str,
    colour: str,
    marker: str,
    dash: str = "-",
) -> None:
    # A bar without length would say that there is no spread.
    bars = None if errors is None else [error or float("nan") for error in errors]
    look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": dash, "elinewidth": 1, "capsize": 3}
    axes.errorbar(list(places), list(values), bars, label=label, **look)


def _wrap(name: str) -> str:
    """A flow's name in short lines, broken after underscores where possible."""
    return textwrap.fill(name.replace("_", "_ "), _NAME).replace("_ ", "_")

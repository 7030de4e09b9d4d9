"""quality.png: a metric against the number of network evaluations, one colour per group of runs."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stillhouse.analysis.quality import QualityLine
from stillhouse.pictures.plots import legend_below, log_scale, save_figure

_LEGEND_LETTERS = 90  # in a line as wide as the figure
_NAME_LETTERS = 50  # of a group, in a line beside the axis
_FLOOR = "real images"
_GREYS = ("black", "0.4", "0.6")


def plot_quality(
    path: str | Path,
    metric: str,
    lines: Sequence[QualityLine],
    *,
    floor: float | None = None,
    spread: str = "training seeds",
) -> Figure:
    """Plot lines over a logarithmic axis of NFE with a tick at every number that occurs.

    Bars reach one standard deviation to either side. Teachers are grey, a dashed line is real images. Students that all take
    one number of evaluations stand one below the other instead, in the order of `lines`.

    Args:
        path: of the PNG file.
        metric: its name.
        lines: of students and teachers.
        floor: the value of real images, or None.
        spread: what the standard deviations are over, in words.

    Returns:
        The figure.
    """
    if len({point.nfe for line in lines if not line.teacher for point in line.points}) == 1:
        return _plot_at_one_nfe(path, metric, lines, floor, spread)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    students = [line for line in lines if not line.teacher]
    for number, line in enumerate(students):
        _plot_line(axes, line, f"C{number % 10}", marker="oDP*X"[number // 10 % 5], linewidth=2)
    for number, line in enumerate(line for line in lines if line.teacher):
        _plot_line(axes, line, _GREYS[number % len(_GREYS)], marker="s^Dv"[number % 4], linewidth=1)
    if floor is not None:
        axes.axhline(floor, color="black", linewidth=1, linestyle="--", label=_FLOOR)
    _scale(axes, lines, floor)
    axes.set(xlabel="network evaluations per image (NFE)", ylabel=metric)
    if any(point.std is not None for line in lines for point in line.points):
        axes.set_title(f"bars: standard deviation over {spread}", fontsize="small")
    axes.grid(alpha=0.25)
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(entries, key=lambda entry: entry[1] == _FLOOR), strict=True)  # it would come first
    legend_below(figure, handles, labels, _LEGEND_LETTERS)
    save_figure(figure, path)
    return figure


def _plot_at_one_nfe(
    path: str | Path, metric: str, lines: Sequence[QualityLine], floor: float | None, spread: str
) -> Figure:
    students = [line for line in lines if not line.teacher]
    names = [textwrap.fill(line.label, _NAME_LETTERS) for line in students]
    rows = sum(1 + name.count("\n") / 2 for name in names)
    figure = Figure(figsize=(9, 2 + 0.3 * rows), layout="constrained")
    axes = figure.subplots()
    for row, line in enumerate(students):
        (point,) = line.points
        axes.errorbar(point.mean, row, xerr=point.std, color="C0", marker="o", markersize=5, elinewidth=1, capsize=3)
    for number, line in enumerate(line for line in lines if line.teacher):
        for point in line.points:
            label = f"{line.label}, {point.nfe} NFE"
            style = (":", "-.", (0, (1, 3)))[number // len(_GREYS) % 3]
            axes.axvline(point.mean, color=_GREYS[number % len(_GREYS)], linewidth=1, linestyle=style, label=label)
    if floor is not None:
        axes.axvline(floor, color="black", linewidth=1, linestyle="--", label=_FLOOR)
    axes.set_yticks(range(len(students)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}, {students[0].points[0].nfe} NFE")
    if any(point.std is not None for line in students for point in line.points):
        axes.set_title(f"bars: standard deviation over {spread}", fontsize="small", loc="right")
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend_below(figure, handles, labels, _LEGEND_LETTERS + 20)
    save_figure(figure, path)
    return figure


def _plot_line(axes: Axes, line: QualityLine, colour: str, marker: str, linewidth: float) -> None:
    # A missing spread draws no bar; zero would draw one of no length, which says that there is none.
    spreads = [float("nan") if point.std is None else point.std for point in line.points]
    seeds = len({seed for point in line.points for seed in point.seeds})
    axes.errorbar(
        [point.nfe for point in line.points],
        [point.mean for point in line.points],
        spreads,
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=linewidth,
        elinewidth=1,
        capsize=3,
        label=f"{line.label}, {seeds} seeds" if seeds > 1 else line.label,
    )


def _scale(axes: Axes, lines: Sequence[QualityLine], floor: float | None) -> None:
    counts = sorted({point.nfe for line in lines for point in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 2**0.25, counts[-1] * 2**0.25)
    log_scale(axes, [point.mean for line in lines for point in line.points] + ([] if floor is None else [floor]))

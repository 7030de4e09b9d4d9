"""paths.png for planar data, images of shape (2, 1, 1): how noise moves to data, and what a flow is trained on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from stillhouse.diffusion import bezier
from stillhouse.diffusion.flow import euler_path
from stillhouse.diffusion.teacher import Teacher
from stillhouse.pictures.plots import legend_below, save_figure

_COLUMNS = 4  # at most
_SIDE = 3.6  # inches
_LETTERS = 40  # of the legend for each column
_NOISE, _DATA, _CONTROL = "C0", "C3", "C2"
_MARGIN = 0.06


class PathPanel(NamedTuple):
    """Curves (N, T, 2) from starts (N, 2) to ends (N, 2), over points (M, 2) of the data, and marks (L, 2) as control points."""

    title: str
    starts: Tensor
    curves: Tensor
    ends: Tensor
    background: Tensor | None = None
    marks: Tensor | None = None


def plot_paths(path: str | Path, panels: Sequence[PathPanel]) -> Figure:
    """Plot panels with equal axes and common limits as a PNG file; returns the figure.

    Raises:
        ValueError: for no panel.
    """
    if not panels:
        raise ValueError("a picture of paths needs at least one panel")
    rows = math.ceil(len(panels) / _COLUMNS)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(_SIDE * columns, _SIDE * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    low, high = _limits(panels)
    for axes, panel in zip(grid, panels, strict=False):
        _plot_panel(axes, panel)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    entries: dict[str, object] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    legend_below(figure, list(entries.values()), list(entries), _LETTERS * columns)
    save_figure(figure, path)
    return figure


def coupling_panel(title: str, noise: Tensor, images: Tensor, background: Tensor | None = None) -> PathPanel:
    """Straight lines from noise to images (N, 2, 1, 1): what a flow is trained on. Those of independent pairs cross."""
    starts, ends = planar_points(noise), planar_points(images)
    return PathPanel(title, starts, torch.stack([starts, ends], 1), ends, background)


def flow_panel(
    title: str, teacher: Teacher, noise: Tensor, labels: Tensor | None, steps: int, background: Tensor | None = None
) -> PathPanel:
    """The paths of a flow's ODE from noise (N, 2, 1, 1), by `steps` Euler steps of equal length in its time."""
    states = [planar_points(z) for z, _ in euler_path(teacher, noise, labels, steps)]
    return PathPanel(title, states[0], torch.stack(states, 1), states[-1], background)


def bezier_panel(title: str, control: Tensor, background: Tensor | None = None, steps: int = 64) -> PathPanel:
    """Bezier curves of control points (N, n + 1, 2, 1, 1), the inner ones marked."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=control.device)
    states = [planar_points(bezier.point(control, t.expand(len(control)))) for t in times]
    inner = control[:, 1:-1].flatten(0, 1)
    marks = planar_points(inner) if len(inner) else None
    return PathPanel(title, states[0], torch.stack(states, 1), states[-1], background, marks)


def planar_points(images: Tensor) -> Tensor:
    """Planar images (N, 2, 1, 1) as points (N, 2), float64, on the CPU."""
    return images.reshape(len(images), 2).double().cpu()


def _limits(panels: Sequence[PathPanel]) -> tuple[list[float], list[float]]:
    """Limits of both axes for everything but the marks, of which some lie far away."""
    everything = [p.curves.flatten(0, 1) for p in panels] + [p.background for p in panels if p.background is not None]
    cloud = torch.cat(everything)
    low, high = cloud.amin(0), cloud.amax(0)
    room = _MARGIN * (high - low).max()
    return (low - room).tolist(), (high + room).tolist()


def _plot_panel(axes: Axes, panel: PathPanel) -> None:
    if panel.background is not None:
        axes.scatter(*panel.background.T, s=4, color="0.7", linewidths=0, zorder=0, label="data")
    axes.add_collection(LineCollection(panel.curves.numpy(), colors="0.35", linewidths=0.7, alpha=0.7, zorder=1))
    axes.scatter(*panel.starts.T, s=9, color=_NOISE, linewidths=0, zorder=2, label="noise")
    axes.scatter(*panel.ends.T, s=9, color=_DATA, linewidths=0, zorder=3, label="end points")
    if panel.marks is not None:
        axes.scatter(*panel.marks.T, s=14, color=_CONTROL, marker="x", linewidths=0.8, zorder=2, label="control points")
    axes.set_title(panel.title, fontsize="medium")

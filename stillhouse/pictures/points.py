"""Scatter plots of points of the plane, which are images of shape (2, 1, 1), over the real points."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stillhouse.diffusion.interpolation import slerp
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise

if TYPE_CHECKING:  # training does without it until something is plotted
    import matplotlib.axes
    import matplotlib.figure

PLANE = (2, 1, 1)
_SIDE = 3.6  # inches of a panel
_LIMIT = 1.15  # of both axes: bytes hold [-1, 1], and samples may lie a little outside
_EDGE = 1.13
_REAL, _SAMPLE = "0.75", "C0"


def plot_points(panels: Mapping[str, Tensor], real: Tensor) -> "matplotlib.figure.Figure":
    """Plot samples in colour over the real points in grey.

    Args:
        panels: title -> samples (N, 2, 1, 1) in about [-1, 1]; those outside of the panel stand at its edge and are counted in
            its title.
        real: (M, 2, 1, 1) in [-1, 1].
    """
    figure, grid = _panels(len(panels))
    for axes, (title, samples) in zip(grid, panels.items(), strict=True):
        points = samples.flatten(1).cpu()
        _prepare(axes, title, real, outside=int((points.abs() > _LIMIT).any(dim=1).sum()))
        axes.scatter(*points.clamp(-_EDGE, _EDGE).T.numpy(), s=3, color=_SAMPLE, linewidths=0, alpha=0.7, zorder=2)
    return figure


@torch.no_grad()
def plot_interpolations(
    samplers: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]],
    real: Tensor,
    seeds: Tensor,
    *,
    num_classes: int,
    steps: int = 200,
) -> "matplotlib.figure.Figure":
    """Plot what each sampler makes of the great circles between the noise of pairs of seeds, one curve for each pair.

    A curve is as continuous as the sampler: dots at its ends, thin dots between, joined by a line that shows jumps. A pair
    keeps the label of its first seed.

    Args:
        samplers: title -> sample(noise, labels).
        real: as in `plot_points`.
        seeds: (P, 2), int64.
        num_classes: of the labels; 0: there are none.
        steps: a curve has one point more.
    """
    z0, z1 = sample_noise(seeds[:, 0], PLANE), sample_noise(seeds[:, 1], PLANE)
    noise = slerp(z0, z1, torch.linspace(0, 1, steps + 1, device=seeds.device)).transpose(0, 1).flatten(0, 1)
    labels = sample_labels(seeds[:, 0], num_classes)
    labels = None if labels is None else labels.repeat_interleave(steps + 1)
    figure, grid = _panels(len(samplers))
    for axes, (title, sample) in zip(grid, samplers.items(), strict=True):
        _prepare(axes, title, real)
        for pair, curve in enumerate(sample(noise, labels).reshape(len(seeds), steps + 1, 2).cpu().numpy()):
            colour = f"C{pair % 10}"
            axes.plot(*curve.T, ".-", color=colour, markersize=2.5, linewidth=0.6, zorder=2)
            axes.plot(*curve[[0, -1]].T, "o", color=colour, markersize=5, zorder=3)
    return figure


def figure_pixels(figure: "matplotlib.figure.Figure") -> np.ndarray:
    """A figure as uint8 RGB (H, W, 3), for loggers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _panels(count: int) -> tuple["matplotlib.figure.Figure", np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIDE * count, _SIDE + 0.3), layout="constrained")
    return figure, figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]


def _prepare(axes: "matplotlib.axes.Axes", title: str, real: Tensor, outside: int = 0) -> None:
    axes.scatter(*real.flatten(1).cpu().T.numpy(), s=3, color=_REAL, linewidths=0, zorder=1)
    axes.set(xlim=(-_LIMIT, _LIMIT), ylim=(-_LIMIT, _LIMIT), aspect="equal")
    axes.set_title(f"{title}\n({outside} outside)" if outside else title, fontsize="medium")

"""check.png: how well a teacher denoises at each noise level, the images that it was tested on, and samples of it."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from stillhouse.metrics.images import to_uint8
from stillhouse.metrics.self_test import SelfTest
from stillhouse.pictures.grids import image_grid
from stillhouse.pictures.plots import save_figure

_COLUMNS = 8


def plot_self_test(path: Path, result: SelfTest, name: str) -> Figure:
    """Plot the self-test of the teacher `name` as a PNG file; returns the figure."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    curve, known, drawn = figure.subplots(1, 3)
    sigmas = [level.sigma for level in result.levels]
    curve.loglog(sigmas, [level.error for level in result.levels], marker="o", label=name)
    curve.loglog(sigmas, [level.linear for level in result.levels], "k--", label="best linear denoiser of each pixel")
    curve.loglog(sigmas, sigmas, color="0.7", linewidth=1, label="the noise itself")
    curve.set(xlabel="noise level sigma", ylabel="root mean square error of the estimate")
    curve.set_ylim(top=3 * max(level.linear for level in result.levels))
    curve.legend(frameon=False, fontsize="small")
    curve.grid(alpha=0.25)
    _show(known, result.images, "real images" if result.real else "its own samples (no real images here)")
    _show(drawn, result.samples, "samples")
    failed = ", ".join(check.name for check in result.failed)
    figure.suptitle(f"{name}: " + (f"failed: {failed}" if failed else "all checks passed"))
    save_figure(figure, path)
    return figure


def _show(axes: Axes, images: Tensor, title: str) -> None:
    axes.set_title(title)
    pixels = to_uint8(images.nan_to_num()).cpu()
    if pixels.shape[1] == 2:  # points of the plane
        x, y = images.cpu().flatten(1).T
        axes.scatter(x, y, s=6)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        return
    axes.imshow(image_grid(pixels, _COLUMNS, gap=1 + pixels.shape[-1] // 32), interpolation="nearest")
    axes.axis("off")

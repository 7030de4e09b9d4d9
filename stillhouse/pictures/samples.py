"""How a run shows its samples: images in grids, points of the plane in scatter plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.metrics.images import from_uint8, to_uint8
from stillhouse.metrics.reference import PackedImages
from stillhouse.metrics.sampling import Sampler
from stillhouse.pictures.grids import image_grid, nearest_images, save_grid, save_interpolations, save_side_by_side
from stillhouse.pictures.plots import save_figure
from stillhouse.pictures.points import PLANE, figure_pixels, plot_interpolations, plot_points

_ROWS, _STRIPS = 16, 4
_PIXELS, _GRID_PIXELS = 48, 32  # small images are enlarged to about so many, in the end and on the way
_NEAREST_AMONG = 70_000  # the first ones of a larger data set, whose pictures may take hours to decode
_AT_ONCE = 5_000  # of them in memory
_POINTS = 2000  # of samples and of real points


class Data(Protocol):
    """What is needed of a datamodule."""

    channels: int
    resolution: int
    num_classes: int

    def reference(self) -> PackedImages: ...


def image_shape(data: Data) -> tuple[int, int, int]:
    """(C, H, W) of the data's images."""
    return data.channels, data.resolution, data.resolution


@torch.no_grad()
def save_final_pictures(
    folder: Path, samplers: Mapping[str, Sampler], data: Data, device: torch.device, with_real: bool = True
) -> None:
    """Write samples.png and interpolation.png.

    Rows of images in samples.png share noise and label; the last column is the real image nearest to the last sampler's,
    by its pixels, among all of them (the first 70,000 of more).
    Points are shown in one panel for each sampler, all of the same noise, over real points.

    Args:
        folder: for the files.
        samplers: title -> sample(noise, labels).
        data: whose images or points they resemble.
        device: to sample on.
        with_real: whether the data set's images are there to be shown.
    """
    if image_shape(data) == PLANE:
        real = _real_points(data)
        samples = {title: _samples(sample, data, _POINTS, device) for title, sample in samplers.items()}
        save_figure(plot_points(samples, real), folder / "samples.png")
        pairs = torch.arange(2 * _STRIPS, device=device).reshape(_STRIPS, 2)
        curves = plot_interpolations(samplers, real, pairs, num_classes=data.num_classes)
        save_figure(curves, folder / "interpolation.png")
        return
    scale = max(1, _PIXELS // data.resolution)
    seeds = torch.arange(_ROWS, device=device)
    noise = sample_noise(seeds, image_shape(data))
    # Each class in turn shows more than random labels do.
    labels = seeds % data.num_classes if data.num_classes else None
    columns = {title: to_uint8(sample(noise, labels)).cpu() for title, sample in samplers.items()}
    if with_real:
        packed = data.reference()
        columns["nearest real"] = nearest_real(packed, list(columns.values())[-1])
    save_side_by_side(folder / "samples.png", columns, scale)
    save_interpolations(
        folder / "interpolation.png",
        samplers,
        seeds[: 2 * _STRIPS].reshape(_STRIPS, 2),
        shape=image_shape(data),
        num_classes=data.num_classes,
        scale=scale,
    )


@torch.no_grad()
def save_progress_picture(
    path: Path, sample: Sampler, data: Data, device: torch.device, rows: int, columns: int
) -> np.ndarray:
    """Write samples of the seeds from 0 on as a PNG file: `rows` of `columns` images, or 2,000 points over as many real ones.

    Returns:
        What the file shows, uint8 RGB (H, W, 3), for loggers.
    """
    if image_shape(data) == PLANE:
        figure = plot_points({"samples": _samples(sample, data, _POINTS, device)}, _real_points(data))
        save_figure(figure, path)
        return figure_pixels(figure)
    images = to_uint8(_samples(sample, data, rows * columns, device)).cpu()
    scale = max(1, _GRID_PIXELS // data.resolution)
    save_grid(path, images, columns, scale)
    return image_grid(images, columns, scale)


def _samples(sample: Sampler, data: Data, count: int, device: torch.device) -> Tensor:
    seeds = torch.arange(count, device=device)
    return sample(sample_noise(seeds, image_shape(data)), sample_labels(seeds, data.num_classes))


def nearest_real(packed: PackedImages, images: Tensor) -> Tensor:
    """For each image, uint8 (N, C, H, W), the nearest real one."""
    nearest = torch.empty(0, *images.shape[1:], dtype=torch.uint8)
    for indices in torch.arange(min(len(packed), _NEAREST_AMONG)).split(_AT_ONCE):
        candidates = torch.cat([nearest, packed.fetch(indices.numpy())[0]])
        nearest = candidates[nearest_images(images, candidates)]
    return nearest


def _real_points(data: Data) -> Tensor:
    packed = data.reference()
    return from_uint8(packed.fetch(np.arange(min(len(packed), _POINTS)))[0])

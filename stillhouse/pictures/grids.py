"""Image grids of samples: plain, side by side, interpolations. Files are PNG and appear whole or not at all."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stillhouse.diffusion.interpolation import slerp
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.files import write_file
from stillhouse.metrics.images import to_uint8

_MARGIN = 12
_GAP = 2
_FONT_SIZE = 14


def image_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 0) -> np.ndarray:
    """Arrange images row by row in one image.

    Args:
        images: uint8 (N, C, H, W), C = 1 or 3.
        columns: images in a row; empty places are white.
        scale: side of the square that each pixel becomes, in pixels.
        gap: white pixels between images.

    Returns:
        uint8 RGB array (H', W', 3).

    Raises:
        ValueError: for other images.
    """
    count, channels, height, width = images.shape
    if images.dtype != torch.uint8 or channels not in (1, 3):
        raise ValueError(f"a grid takes uint8 images (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    rows = -(-count // columns)
    cells = np.full((rows * columns, height * scale + gap, width * scale + gap, 3), 255, np.uint8)
    pixels = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    cells[:count, : height * scale, : width * scale] = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    grid = cells.reshape(rows, columns, *cells.shape[1:]).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * cells.shape[1], columns * cells.shape[2], 3)
    return grid[: len(grid) - gap, : grid.shape[1] - gap]


def save_grid(path: str | Path, images: Tensor, columns: int, scale: int = 1) -> None:
    """Write `image_grid` with narrow gaps as a PNG file."""
    _save(path, Image.fromarray(image_grid(images, columns, scale, _GAP)))


def save_side_by_side(path: str | Path, columns: Mapping[str, Tensor], scale: int = 1, rows: int = 8) -> None:
    """Write titled columns of images, such as teacher, student and nearest real image, one row for each noise.

    Args:
        path: of the PNG file.
        columns: title -> uint8 (N, C, H, W), all of the same length.
        scale: side of the square that each pixel becomes, in pixels.
        rows: after so many the columns begin again to the right.

    Raises:
        ValueError: for columns of different lengths.
    """
    if len({len(images) for images in columns.values()}) != 1:
        counts = ", ".join(f"{title} {len(images)}" for title, images in columns.items())
        raise ValueError(f"columns side by side need equally many images, got {counts}")
    titles = {title: title.replace(" ", "\n") for title in columns}
    total = len(next(iter(columns.values())))
    blocks = [
        [
            _titled(titles[title], Image.fromarray(image_grid(images[start : start + rows], 1, scale, _GAP)), titles)
            for title, images in columns.items()
        ]
        for start in range(0, total, rows)
    ]
    _save(path, _row([_row(panels, 3 * _GAP) for panels in blocks], 3 * _MARGIN))


def nearest_images(images: Tensor, candidates: Tensor, chunk: int = 1 << 28) -> Tensor:
    """For each image the nearest candidate by the L2 distance of pixels, the first of equals.

    Args:
        images: uint8 (N, C, H, W).
        candidates: uint8 (M, C, H, W).
        chunk: largest number of bytes that converted candidates and distances take at once.

    Returns:
        Indices (N,), int64.
    """
    queries = images.flatten(1).double()  # in which sums of products of bytes are exact
    step = max(1, chunk // (8 * (queries.shape[1] + len(queries))))
    best = queries.new_full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(candidates), step):
        part = candidates[start : start + step].to(queries.device).flatten(1).double()
        # |q|^2 is the same for every candidate and left out.
        distance, position = (part.square().sum(dim=1) - 2 * queries @ part.T).min(dim=1)
        closer = distance < best
        best = torch.where(closer, distance, best)
        index = torch.where(closer, position + start, index)
    return index


def save_interpolations(
    path: str | Path,
    samplers: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]],
    seeds: Tensor,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    steps: int = 11,
    scale: int = 1,
) -> None:
    """Write spherical interpolations between the noise of two seeds, a row for each pair of seeds and sampler.

    Where there are classes, a pair keeps the label of its first seed throughout.

    Args:
        path: of the PNG file.
        samplers: row title -> sample(noise, labels), such as teacher and student.
        seeds: (P, 2), int64, on the device to sample on.
        shape: (C, H, W) of the noise.
        num_classes: of the labels; 0: there are none.
        steps: images from u = 0 to 1 in a row.
        scale: side of the square that each pixel becomes, in pixels.
    """
    z0, z1 = sample_noise(seeds[:, 0], shape), sample_noise(seeds[:, 1], shape)
    path_noise = slerp(z0, z1, torch.linspace(0, 1, steps, device=seeds.device)).transpose(0, 1).flatten(0, 1)
    labels = sample_labels(seeds[:, 0], num_classes)
    labels = None if labels is None else labels.repeat_interleave(steps)
    with torch.no_grad():
        strips = {title: to_uint8(sample(path_noise, labels)).cpu() for title, sample in samplers.items()}
    lines = []
    for pair in range(len(seeds)):
        part = slice(pair * steps, (pair + 1) * steps)
        grids = [Image.fromarray(image_grid(images[part], steps, scale, _GAP)) for images in strips.values()]
        lines.append(_column([_named(title, grid, strips) for title, grid in zip(strips, grids, strict=True)], _GAP))
    _save(path, _column(lines, _MARGIN))


def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # it carries this font, so titles look the same on every machine

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _FONT_SIZE)


def _text(text: str) -> Image.Image:
    font = _font()
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    image = Image.new("RGB", (int(right - left) + 2, int(bottom - top) + 2), "white")
    ImageDraw.Draw(image).multiline_text((1 - left, 1 - top), text, "black", font=font, align="center")
    return image


def _titled(title: str, panel: Image.Image, titles: Mapping[str, str]) -> Image.Image:
    """The panel under its title, as wide and with as much room above as every other of `titles` needs."""
    texts = [_text(t) for t in titles.values()]
    room = max(t.height for t in texts) + _MARGIN // 2
    image = Image.new("RGB", (max(panel.width, *(t.width for t in texts)), room + panel.height), "white")
    text = _text(title)
    image.paste(text, ((image.width - text.width) // 2, room - _MARGIN // 2 - text.height))
    image.paste(panel, ((image.width - panel.width) // 2, room))
    return image


def _named(title: str, strip: Image.Image, titles: Mapping[str, Tensor]) -> Image.Image:
    """The strip with its title at the left, in a margin wide enough for all titles."""
    left = max(_text(t).width for t in titles) + _MARGIN
    text = _text(title)
    image = Image.new("RGB", (left + strip.width, max(strip.height, text.height)), "white")
    image.paste(text, (left - _MARGIN - text.width, (image.height - text.height) // 2))
    image.paste(strip, (left, 0))
    return image


def _row(images: list[Image.Image], gap: int) -> Image.Image:
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    whole = Image.new("RGB", (width, max(image.height for image in images)), "white")
    x = 0
    for image in images:
        whole.paste(image, (x, 0))
        x += image.width + gap
    return whole


def _column(images: list[Image.Image], gap: int) -> Image.Image:
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    whole = Image.new("RGB", (max(image.width for image in images), height), "white")
    y = 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height + gap
    return whole


def _save(path: str | Path, image: Image.Image) -> None:
    framed = Image.new("RGB", (image.width + 2 * _MARGIN, image.height + 2 * _MARGIN), "white")
    framed.paste(image, (_MARGIN, _MARGIN))
    buffer = io.BytesIO()
    framed.save(buffer, "PNG", optimize=True)
    write_file(path, buffer.getvalue())

"""Images/s of the one-time packing of a source into the memory map that training reads."""

import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import clock, summary
from datamodules import EDMZip, ImageFolder

_DETAIL = 8
"""Pixels of a random picture from one random value to the next: it compresses about as photographs do."""


def pictures(count: int, side: int) -> np.ndarray:
    """uint8 (count, side, side, 3): smooth random colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, side // _DETAIL, side // _DETAIL, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)) for small in coarse]
    )


def write_zip(path: Path, images: np.ndarray) -> Path:
    """As EDM's dataset_tool writes it: stored PNG files without compression."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, pixels in enumerate(images):
            archive.writestr(f"{i // 1000:05d}/img{i:08d}.png", _encoded(pixels, format="png", compress_level=0))
    return path


def write_jpegs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, pixels in enumerate(images):
        (folder / f"{i:08d}.jpg").write_bytes(_encoded(pixels, format="jpeg", quality=90))
    return folder


def _encoded(pixels: np.ndarray, **options: Any) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, **options)
    return content.getvalue()


def measure(count: int = 10_000, jpegs: int = 1000, side: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Images/s of `count` images of 64x64 in EDM's zip, and of `jpegs` pictures of `side` that are shrunk to 64x64.

    The files are read before, so that the disk has no part in it; the packed folders are written anew each time.
    """
    common = {"batch_size": 1, "resolution": 64, "num_classes": 0}
    rates: dict[str, list[float]] = {"zip_images_per_second": [], "jpeg_images_per_second": []}
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        archive = write_zip(Path(folder) / "images.zip", pictures(count, 64))
        photographs = write_jpegs(Path(folder) / "jpegs", pictures(jpegs, side))
        for round_ in range(1 + rounds):
            for name, kind, source, images in (
                ("zip_images_per_second", EDMZip, archive, count),
                ("jpeg_images_per_second", ImageFolder, photographs, jpegs),
            ):
                data = kind(f"{name}-{round_}", folder, path=str(source), **common)
                begun = clock()
                data.prepare_data()
                rates[name].append(images / (clock() - begun))
                shutil.rmtree(data.folder)
    return {
        "title": f"packing at 64x64: {count:,} PNGs of that size in a zip, {jpegs:,} JPEGs of {side}x{side} in a folder",
        "device": "cpu",
        "batch_size": 1,
        **{name: summary(values[1:]) for name, values in rates.items()},
    }

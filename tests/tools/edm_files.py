"""Zips as EDM's dataset_tool writes them: PNG files in numbered folders, and dataset.json with their classes."""

import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def png(pixels: np.ndarray, compress_level: int = 0) -> bytes:
    """uint8 (H, W, 3), or (H, W) for grey levels."""
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="png", compress_level=compress_level, optimize=False)
    return content.getvalue()


def edm_zip(
    path: Path,
    images: np.ndarray,
    labels: list[int] | None = None,
    compress_level: int = 0,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """`images` uint8 (N, H, W, 3)."""
    names = [f"{i // 10:05d}/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, pixels in zip(names, images, strict=True):
            archive.writestr(name, png(pixels, compress_level))
        listed = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": listed}))
    return path

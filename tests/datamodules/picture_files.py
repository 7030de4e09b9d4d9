"""Small pictures that are the same everywhere, as files in folders or zips."""

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def pattern(width: int, height: int, channels: int = 3, shift: int = 0) -> np.ndarray:
    """uint8 (H, W, channels): waves of integers, for Lanczos to show its ringing."""
    y, x, c = np.ogrid[:height, :width, :channels]
    return ((x * (5 + c) + y * (3 + 2 * c) + x * y // 7 * (1 + shift) + 40 * shift) % 256).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    """A file's content; pixels (H, W, 1) are grey, (H, W, 4) are CMYK unless `mode` says RGBA."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if pixels.shape[-1] == 4 and mode is None:
        image = Image.merge("CMYK", image.split())
    content = BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zip_of(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path

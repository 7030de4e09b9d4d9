"""Small pictures that are the same everywhere, as files in folders or zips."""

import struct
import zipfile
import zlib
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


def png16(values: np.ndarray, transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write; values uint16 (H, W, 1 to 4), `transparent` one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff16(values: np.ndarray, order: str = "<", deflate: bool = False, planar: bool = False) -> bytes:
    """A TIFF of 16 bits per channel; values uint16 (H, W, 1, 3 or 4), `order` < or >, planar: channel after channel."""
    height, width, channels = values.shape
    planes = values.transpose(2, 0, 1) if planar else values[None]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    sizes = [len(strip) for strip in strips]
    colour = 2 if channels > 1 else 1
    tags = [(256, "H", [width]), (257, "H", [height]), (258, "H", [16] * channels), (259, "H", [8 if deflate else 1])]
    tags += [(262, "H", [colour]), (273, "I", [0] * len(strips)), (277, "H", [channels]), (278, "H", [height])]
    tags += [(279, "I", sizes), (284, "H", [2 if planar else 1])] + [(338, "H", [2])] * (channels == 4)
    values_at = 8 + 2 + 12 * len(tags) + 4
    data_at = values_at + sum(len(v) * struct.calcsize(kind) for _, kind, v in tags if len(v) > 1 or kind == "I")
    entries, beyond = b"", b""
    for tag, kind, found in tags:
        if tag == 273:
            found = [data_at + sum(sizes[:i]) for i in range(len(sizes))]
        packed = struct.pack(f"{order}{len(found)}{kind}", *found)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}I", values_at + len(beyond)), beyond + packed
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(found)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return (head + entries + bytes(4) + beyond).ljust(data_at, b"\0") + b"".join(strips)

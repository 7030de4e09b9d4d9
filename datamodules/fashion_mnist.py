"""Fashion-MNIST: grey pictures of clothes, from the four published IDX files (Xiao et al., arXiv 1708.07747)."""

import gzip
import math
import zlib
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datamodules.components.file_datamodule import ImageSource, PixelDataModule, array_source
from datamodules.components.packed_images import PackedImages
from stillhouse.checkpoints.bounds import BoundedStream

_CLASSES, _SIDE = 10, 28
_PARTS = {
    "training": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_PREPROCESSING = {
    28: "none",
    32: "a margin of 2 zeros",
    16: "a margin of 2 zeros, then means of 2x2 pixels, halves rounded up",
}
# SHA-256 of the unpacked files; Debian packs them anew, with the same content.
_CONTENT = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class FashionMNIST(PixelDataModule):
    """60,000 training images in ten classes, in the order of the file, and 10,000 test images that no training sees.

    28x28 pixels as published, 32x32 with a margin of zeros, or 16x16 of their means.

    Args:
        path: The folder with the four files, as they are published (NAME.gz) or unpacked (NAME).
        packaged: A folder that is read where `path` is missing: that of Debian's package dataset-fashion-mnist.
        url: The folder from which `download=true` fetches `files`.
        files: SHA-256 of the published files by their names; what is read is then compared with the published content. None:
            any files of that format.
        part: "training" or "test".

    Raises:
        ValueError: For another resolution or number of classes.
    """

    how_to_get = "add download=true, install Debian's package dataset-fashion-mnist, or set data.path"
    source_channels = 1

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        path: str,
        packaged: str | None = None,
        url: str | None = None,
        files: Mapping[str, str] | None = None,
        part: str = "training",
        **common: Any,
    ):
        super().__init__(name, root, path=path, **common)
        if self.resolution not in _PREPROCESSING or self.classes not in (0, _CLASSES):
            raise ValueError(
                f"data.resolution={self.resolution}, data.num_classes={self.classes}: Fashion-MNIST is served with "
                f"{', '.join(map(str, sorted(_PREPROCESSING)))} pixels a side and {_CLASSES} classes; correct the options"
            )
        if packaged and not self.path.exists() and Path(packaged).exists():
            self.path = Path(packaged)
        self.published, self.part = files is not None, part
        self._common = common
        self._held_out: PackedImages | None = None

    @property
    def source_paths(self) -> list[Path]:
        return [_file(self.path, name) for name in _PARTS[self.part]]

    def source(self) -> ImageSource:
        images, labels = (self._read(name) for name in _PARTS[self.part])
        if images.shape[1:] != (_SIDE, _SIDE) or labels.shape != images.shape[:1]:
            raise OSError(
                f"{self.path}: {_PARTS[self.part][0]} holds {_by(images.shape)} values and {_PARTS[self.part][1]} "
                f"{_by(labels.shape)}, instead of images of {_SIDE}x{_SIDE} and a class for each; get them again"
            )
        return array_source(
            resized(images, self.resolution)[:, None],
            labels if self.classes else None,
            f"{self.path.name}, {_PARTS[self.part][0]}",
            _PREPROCESSING[self.resolution],
        )

    def prepare_data(self) -> None:
        super().prepare_data()
        if self.part == "training" and self.folder.exists():
            self.held_out()  # so that missing test images are seen before a training, not after it

    def held_out(self) -> PackedImages:
        if self._held_out is not None:
            return self._held_out
        test = FashionMNIST(
            f"{self.name}_test",
            str(self.folder.parent),
            path=str(self.path),
            files={} if self.published else None,
            part="test",
            **self._common,
        )
        self._held_out = test.reference()
        return self._held_out

    def _read(self, name: str) -> np.ndarray:
        file = _file(self.path, name)
        values, digest = read_idx(file)
        if self.published and digest != _CONTENT[name]:
            raise OSError(
                f"{file} is another file than the published {name}, the SHA-256 of its content is {digest[:16]}... instead of "
                f"{_CONTENT[name][:16]}...; get it again, or set data.files=null to read any files of this format"
            )
        return values


def resized(images: np.ndarray, resolution: int) -> np.ndarray:
    """Images uint8 (N, 28, 28) as (N, resolution, resolution), by `_PREPROCESSING`."""
    if resolution == _SIDE:
        return images
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    if resolution == 32:
        return images
    count = len(images)
    sums = images.reshape(count, 16, 2, 16, 2).sum((2, 4), dtype=np.uint16)
    return ((sums + 2) // 4).astype(np.uint8)


def read_idx(path: Path) -> tuple[np.ndarray, str]:
    """An IDX file of bytes, packed by gzip or not: two zeros, the type 8, the number of axes, their lengths, the values.

    Returns:
        The values, uint8, and the SHA-256 (hex) of the unpacked file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is damaged, or no IDX file of bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get it again, or correct data.path")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _values(BoundedStream(file, path.stat().st_size, "its content"))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise OSError(f"{path} is damaged ({error}); get it again") from error


def _values(file: BinaryIO | BoundedStream) -> tuple[np.ndarray, str]:
    magic = file.read(4)
    if len(magic) != 4 or magic[:3] != b"\0\0\x08":
        raise ValueError(f"it begins with {magic.hex(' ') or 'nothing'}, not as an IDX file of bytes")
    axes = file.read(4 * magic[3])
    shape = tuple(int.from_bytes(axes[i : i + 4], "big") for i in range(0, len(axes), 4))
    values = file.read(math.prod(shape) + 1)
    if len(axes) != 4 * magic[3] or len(values) != math.prod(shape):
        raise ValueError(
            f"it announces {_by(shape)} values and holds {'more' if len(values) > math.prod(shape) else len(values)}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape), sha256(magic + axes + values).hexdigest()


def _file(folder: Path, name: str) -> Path:
    unpacked = folder / name
    return unpacked if unpacked.is_file() else folder / f"{name}.gz"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "no"

"""Fashion-MNIST: grey pictures of clothes, from the four published IDX files (Xiao et al., arXiv 1708.07747)."""

import gzip
import math
import zlib
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datamodules.components.file_datamodule import ContentHashes, ImageSource, PixelDataModule, array_source
from datamodules.components.packed_images import PackedImages, read_meta, way_out
from stillhouse.checkpoints.bounds import BoundedStream
from stillhouse.checks import check_choice

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
# SHA-256 of the published files, as conf/data/fashion_mnist.yaml has them.
_FILES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
# Of what is in them: Debian packs the same content anew.
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
        packaged: The folder of Debian's package dataset-fashion-mnist, from which each file is read that `path` lacks.
        url: The folder from which `download=true` fetches `files`.
        files: SHA-256 of the published files by their names; what is read is then compared with the published content. None:
            any files of that format, from `path` alone.
        part: "training" or "test".

    Raises:
        ValueError: For another resolution, number of classes or part, or other files than the published ones.
    """

    how_to_get = "put the file there, packed by gzip or not, or set data.path"
    source_channels = 1
    test_files = tuple(f"{name}.gz" for name in _PARTS["test"])

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
        super().__init__(name, root, path=path, url=url, **common)
        check_choice("data.part", part, tuple(_PARTS))
        if self.resolution not in _PREPROCESSING or self.classes not in (0, _CLASSES):
            raise ValueError(
                f"data.resolution={self.resolution}, data.num_classes={self.classes}: Fashion-MNIST is served with "
                f"{', '.join(map(str, sorted(_PREPROCESSING)))} pixels a side and {_CLASSES} classes; correct the options"
            )
        if changed := [file for file, sha256 in (files or {}).items() if sha256 != _FILES.get(file)]:
            raise ValueError(
                f"data.files: {changed[0]} has another SHA-256 than the published file; leave data.files as it is, or set "
                "data.files=null and put files of your own at data.path"
            )
        self.published, self.part = files is not None, part
        # A copy of the published files stands in for these alone, never for others of the same format.
        self._folders = [self.path, *([Path(packaged).expanduser()] if packaged and self.published else [])]
        self._test: FashionMNIST | None = None
        if part == "training":
            options = {"path": path, "packaged": packaged, "url": url, "files": files, **common}
            self._test = FashionMNIST("test", str(self.folder), part="test", **options)

    @property
    def source_paths(self) -> list[Path]:
        return [self._file(name) for name in _PARTS[self.part]]

    @property
    def place(self) -> str:
        return " and ".join(dict.fromkeys(str(path.parent) for path in self.source_paths))

    def missing_source(self) -> Path | None:
        return next((path for path in self.source_paths if not path.is_file()), None)

    def way_to_get(self, missing: Path) -> str:
        ways = (
            [f"add download=true to fetch {self.url.rstrip('/')}/{missing.name}"] if self.url and self.published else []
        )
        ways += ["install Debian's package dataset-fashion-mnist"] if len(self._folders) > 1 else []
        return ", ".join([*ways, f"or {self.how_to_get}" if ways else self.how_to_get])

    def provenance(self, stamp: str, hashes: ContentHashes) -> dict[str, Any]:
        return {**super().provenance(stamp, hashes), "published": self.published}

    def check_source(self) -> None:
        super().check_source()
        if self._test is not None:
            self._test.check_source()

    def source(self) -> ImageSource:
        images, labels = (self._read(name) for name in _PARTS[self.part])
        if images.shape[1:] != (_SIDE, _SIDE) or labels.shape != images.shape[:1]:
            raise OSError(
                f"{self.place}: {_PARTS[self.part][0]} holds {_by(images.shape)} values and {_PARTS[self.part][1]} "
                f"{_by(labels.shape)}, instead of images of {_SIDE}x{_SIDE} and a class for each; get them again"
            )
        return array_source(
            resized(images, self.resolution)[:, None],
            labels if self.classes else None,
            f"{self.source_paths[0].parent.name}, {_PARTS[self.part][0]}",
            _PREPROCESSING[self.resolution],
        )

    def prepare_data(self) -> None:
        super().prepare_data()
        if self._test is not None and self.folder.exists():
            self._test.prepare_data()

    def held_out(self) -> PackedImages | None:
        if self._test is None:
            return None
        self.reference()  # first: the folder of the test images lies in that of the training images
        return self._test.reference()

    def _check_unchanged(self) -> None:
        super()._check_unchanged()
        if self.published and not read_meta(self.folder).get("published", True):
            raise ValueError(
                f"{self.folder} was packed with data.files=null, of any files of that format: {way_out(self.folder)}, or set "
                "data.files=null or data.name"
            )

    def _file(self, name: str) -> Path:
        """The file that is read; where there is none, its place in `path`."""
        places = [folder / file for folder in self._folders for file in (name, f"{name}.gz")]
        return next((place for place in places if place.is_file()), self.path / f"{name}.gz")

    def _read(self, name: str) -> np.ndarray:
        file = self._file(name)
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


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "no"

"""CIFAR-10: the published archive for Python, the folder that it unpacks to, or EDM's zip."""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datamodules.components.edm_zip import edm_source
from datamodules.components.file_datamodule import ImageSource, PixelDataModule, array_source
from datamodules.components.numpy_pickle import numbers, unpickle
from stillhouse.checkpoints.bounds import BoundedStream
from stillhouse.checkpoints.weights import hash_file

_FOLDER = "cifar-10-batches-py"
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_CLASSES, _SIDE = 10, 32


class CIFAR10(PixelDataModule):
    """50,000 training images in ten classes, in the order of the batches, which is also EDM's; every source gives the same bytes.

    Args:
        path: cifar-10-python.tar.gz, cifar-10-batches-py or the folder around it (torchvision's root), or EDM's zip.
        sha256: Of the archive, compared before it is read; None: any archive.
    """

    how_to_get = "get cifar-10-python.tar.gz and set data.path"

    def __init__(self, name: str, root: str = "data", *, path: str, sha256: str | None = None, **common):
        super().__init__(name, root, path=path, **common)
        self.sha256 = sha256

    @property
    def source_paths(self) -> list[Path]:
        # Of torchvision's root, which may hold other data sets and runs, nothing else.
        return [_batches(self.path) / name for name in _BATCHES] if self.path.is_dir() else [self.path]

    def source(self) -> ImageSource:
        if zipfile.is_zipfile(self.path):
            return edm_source(self.path, self.resolution, self.classes)
        if self.resolution != _SIDE or self.classes not in (0, _CLASSES):
            raise ValueError(
                f"data.resolution={self.resolution}, data.num_classes={self.classes}: CIFAR-10 has {_SIDE} pixels a side "
                f"and {_CLASSES} classes; correct the options"
            )
        if self.path.is_file() and self.sha256 and (actual := hash_file(self.path)) != self.sha256.lower():
            way_out = f"add download=true to fetch {self.url}" if self.url else "get it again"
            raise OSError(
                f"{self.path} is cut short or another file, its SHA-256 is {actual[:16]}... instead of {self.sha256[:16]}...; "
                f"delete it and {way_out}"
            )
        with _opened(self.path) as read:
            batches = [_batch(read, name, self.path) for name in _BATCHES]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        description = f"{self.path.name}, data_batch_1 to data_batch_5"
        return array_source(images, labels if self.classes else None, description)


def _batches(path: Path) -> Path:
    """The folder of the batches: this one, or the one in it."""
    return path / _FOLDER if (path / _FOLDER).is_dir() else path


@contextmanager
def _opened(path: Path) -> Iterator:
    """Yield a function from a batch's name to its file."""
    if path.is_dir():
        folder = _batches(path)

        def member(name: str) -> BinaryIO:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; unpack cifar-10-python.tar.gz again or set data.path"
                )
            return BytesIO((folder / name).read_bytes())

        yield member
        return
    try:
        with gzip.open(path) as unzipped:
            # Bounded, for tarfile reads as much at once as a header says.
            stream = BoundedStream(unzipped, path.stat().st_size, "its content")
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                batches = (one for one in archive if one.isfile() and Path(one.name).name in _BATCHES)
                content = {Path(one.name).name: archive.extractfile(one).read() for one in batches}
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise OSError(f"{path} is damaged or cut short ({error}); delete it and get it again") from error

    def unpacked(name: str) -> BinaryIO:
        if name not in content:
            raise OSError(f"{path} holds no {name}; get cifar-10-python.tar.gz, of Python's version, or set data.path")
        return BytesIO(content[name])

    yield unpacked


def _batch(read, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 3, 32, 32) and classes int64 (n,)."""
    where = f"{name} in {path}"
    batch = unpickle(read(name), where)
    images, labels = batch.get("data"), numbers(batch.get("labels"))
    right = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (3 * _SIDE**2,)
    if not right or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise OSError(f"{where} is not one of CIFAR-10's batches of images and labels; get the archive again")
    return images.reshape(-1, 3, _SIDE, _SIDE), labels.astype(np.int64)

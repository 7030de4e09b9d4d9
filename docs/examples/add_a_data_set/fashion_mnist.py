"""Fashion-MNIST: 60,000 grey training images of 28x28 in ten classes, from the two published IDX files."""

import gzip
from pathlib import Path

import numpy as np

from datamodules import ImageSource, PixelDataModule, array_source

_IMAGES, _LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


class FashionMNIST(PixelDataModule):
    """The training images in the order of the file.

    Args:
        path: The folder with the two files.
    """

    how_to_get = f"put {_IMAGES} and {_LABELS} of github.com/zalandoresearch/fashion-mnist there, or set data.path"
    source_channels = 1

    @property
    def source_paths(self) -> list[Path]:
        return [self.path / _IMAGES, self.path / _LABELS]

    def source(self) -> ImageSource:
        images = read_idx(self.path / _IMAGES)  # (60000, 28, 28)
        labels = read_idx(self.path / _LABELS) if self.classes else None
        return array_source(images[:, None], labels, description=_IMAGES)


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of bytes: two zeros, the type 8, the number of axes, their lengths, then the values.

    Raises:
        OSError: The file is missing, damaged, or no IDX file of bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get it again, or correct data.path")
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]
        shape = np.frombuffer(content, ">i4", count=axes, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        if content[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of bytes")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise OSError(f"{path} is damaged ({error}); get it again") from error

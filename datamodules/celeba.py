"""CelebA, aligned and cropped: the faces of its training partition, cut as the code of DDIM does."""

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from datamodules.components.file_datamodule import ImageSource, PictureDataModule, PixelDataModule, picture_source
from datamodules.components.picture_files import PictureFiles

_SIZE = (178, 218)
_BOX = (25, 57, 153, 185)  # 128x128 around x = 89, y = 121
_IMAGES, _PARTITION, _ATTRIBUTES = "img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt"


class CelebA(PictureDataModule, PixelDataModule):
    """162,770 faces, in the order of their names.

    The 128x128 pixels around (89, 121) are shrunk by Pillow's bilinear filter, which is torchvision's Resize in DDIM's code.

    Args:
        path: img_align_celeba or img_align_celeba.zip with list_eval_partition.txt beside it, or the folder that holds them.
        attribute: A column of list_attr_celeba.txt: class 1 where it is +1, else 0. None: no classes.

    Raises:
        ValueError: The number of classes is not the attribute's.
    """

    how_to_get = "get img_align_celeba.zip and list_eval_partition.txt of CelebA and set data.path"

    def __init__(self, name: str, root: str = "data", *, path: str, attribute: str | None = None, **common):
        super().__init__(name, root, path=path, **common)
        if self.classes != (2 if attribute else 0):
            raise ValueError(
                f"data.attribute={attribute}, data.num_classes={self.classes}: an attribute has 2 classes and null has 0; "
                "correct the options"
            )
        self.attribute = attribute

    @property
    def pixel_options(self) -> dict[str, Any]:
        return {**super().pixel_options, "attribute": self.attribute}

    @property
    def source_paths(self) -> list[Path]:
        lists = (_PARTITION, _ATTRIBUTES) if self.attribute else (_PARTITION,)
        return [self._images, *(self._images.parent / name for name in lists)]

    @property
    def _images(self) -> Path:
        return next((p for p in (self.path / _IMAGES, self.path / f"{_IMAGES}.zip") if p.exists()), self.path)

    def source(self) -> ImageSource:
        images = self._images
        partition = {name: values == ["0"] for name, values in _by_name(images.parent / _PARTITION).items()}
        files = PictureFiles(images, only=lambda name: partition.get(PurePosixPath(name).name, False))
        names = [PurePosixPath(name).name for name in files.names]
        missing = sorted({name for name, training in partition.items() if training}.difference(names))
        if missing:
            raise FileNotFoundError(
                f"{images} lacks {len(missing):,} training images of {_PARTITION}, {missing[0]} the first; get it again"
            )
        labels = self._labels(images.parent / _ATTRIBUTES, names) if self.attribute else None
        preprocessing = "128x128 around (89, 121), Pillow's bilinear"
        source = picture_source(self.name, files, self.rules, self._cut, preprocessing, labels)
        kind = f"{source.description}, class 1: {self.attribute}" if self.attribute else source.description
        return replace(source, description=kind)

    def _labels(self, path: Path, names: list[str]) -> np.ndarray:
        rows = _by_name(path)
        heads = list(rows.items())[:2]  # the number of images, the attributes
        if len(heads) < 2:
            raise OSError(f"{path} is cut short; get it again")
        attributes = [heads[1][0], *heads[1][1]]
        if self.attribute not in attributes:
            raise ValueError(f"data.attribute={self.attribute} is not in {path}; choose among {', '.join(attributes)}")
        column = attributes.index(self.attribute)
        values = {name: row[column] for name, row in rows.items() if len(row) == len(attributes)}
        absent = next((name for name in names if values.get(name) not in ("1", "-1")), None)
        if absent is not None:
            raise OSError(f"{path} gives {absent} no value of {self.attribute}; get it again")
        return np.array([values[name] == "1" for name in names]).astype(np.int64)

    def _cut(self, image: Image.Image, where: str) -> Image.Image:
        if image.size != _SIZE:
            raise ValueError(
                f"{where} has {image.width}x{image.height} pixels instead of {_SIZE[0]}x{_SIZE[1]}; "
                f"set data.path to the aligned images, {_IMAGES}"
            )
        return image.crop(_BOX).resize((self.resolution, self.resolution), Image.Resampling.BILINEAR)


def _by_name(path: Path) -> dict[str, list[str]]:
    """The words of each line after the first one, by that one.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: Two lines differ about one name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get it from CelebA's page and put it beside the images")
    rows: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if words := line.split():
            name, *values = words
            if rows.setdefault(name, values) != values:
                first, second = " ".join(rows[name]), " ".join(values)
                raise ValueError(f"{path} gives {name} both {first} and {second}; get it again")
    return rows

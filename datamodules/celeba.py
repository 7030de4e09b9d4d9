"""CelebA, aligned and cropped: the faces of its training partition, cut as the code of DDIM does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from datamodules.files import Files
from datamodules.packing import PackedImages
from datamodules.sources import PixelDataModule, Source, identity_of, picture_source

_SIZE = (178, 218)
_BOX = (25, 57, 153, 185)  # 128x128 around x = 89, y = 121
_IMAGES, _PARTITION, _ATTRIBUTES = "img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt"


class CelebA(PixelDataModule):
    """162,770 faces, in the order of their names; `attribute` (of list_attr_celeba.txt) is class 1 where it is +1.

    `path`: img_align_celeba or img_align_celeba.zip with list_eval_partition.txt beside it, or the folder of these. The
    128x128 pixels around (89, 121) are shrunk by Pillow's bilinear filter, which is torchvision's Resize in DDIM's code.
    """

    get = "get img_align_celeba.zip and list_eval_partition.txt of CelebA and set data.path"

    def __init__(self, name: str, root: str = "data", *, path: str, attribute: str | None = None, **common):
        super().__init__(name, root, path=path, **common)
        if self.classes != (2 if attribute else 0):
            raise ValueError(
                f"data.attribute={attribute}, data.num_classes={self.classes}: an attribute has 2 classes and null has 0; "
                "correct the options"
            )
        self.attribute = attribute

    def source(self) -> Source:
        images = next((p for p in (self.path / _IMAGES, self.path / f"{_IMAGES}.zip") if p.exists()), self.path)
        partition = {name: values == ["0"] for name, values in _rows(images.parent / _PARTITION)}
        files = Files(images, only=lambda name: partition.get(PurePosixPath(name).name, False))
        names = [PurePosixPath(name).name for name in files.names]
        missing = sorted({name for name, training in partition.items() if training}.difference(names))
        if missing:
            raise FileNotFoundError(
                f"{images} lacks {len(missing):,} training images of {_PARTITION}, {missing[0]} the first; get it again"
            )
        labels = self._labels(images.parent / _ATTRIBUTES, names) if self.attribute else None
        source = picture_source(self.name, files, self._cut, "128x128 around (89, 121), Pillow's bilinear", labels)
        kind = f"{source.description}, class 1: {self.attribute}" if self.attribute else source.description
        return replace(source, description=kind, identity=identity_of(source.identity, self.attribute))

    def _labels(self, path: Path, names: list[str]) -> np.ndarray:
        rows = _rows(path)
        next(rows)  # the number of images
        first, others = next(rows)
        attributes = [first, *others]
        if self.attribute not in attributes:
            raise ValueError(f"data.attribute={self.attribute} is not in {path}; choose among {', '.join(attributes)}")
        column = attributes.index(self.attribute)
        values = {name: row[column] for name, row in rows if len(row) == len(attributes)}
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

    def reference(self) -> PackedImages:
        packed = super().reference()
        if self.attribute and not packed.meta["source"].endswith(f": {self.attribute}"):
            raise ValueError(
                f"data.attribute={self.attribute}, but {self.folder} was packed with another; set another data.name"
            )
        return packed


def _rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get it from CelebA's page and put it beside the images")
    with open(path) as file:
        for line in file:
            if words := line.split():
                yield words[0], words[1:]

"""ImageNet as published at 64x64 ("downsampled ImageNet"): batches of pixels in .npz files, in zips of these, or pickles."""

import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.components.file_datamodule import ImageSource, PixelDataModule, labels_hash
from datamodules.components.numpy_pickle import numbers, unpickle
from datamodules.components.picture_files import json_hash, open_zip
from stillhouse.checkpoints.bounds import array_header, check_growth
from stillhouse.checkpoints.weights import hash_file

_CHUNK = 1024  # images
_MAPPING = "map_clsloc.txt"


class DownsampledImageNet(PixelDataModule):
    """1,281,167 training images; their pixels are not EDM's, for another filter shrank other parts of the pictures.

    The published labels are numbers of map_clsloc.txt, in an order of its own. That file (`n02119789 1 kit_fox` in each line)
    in the same folder turns them into places among the sorted WordNet names, which ImageNet and EDM's teachers use.

    Args:
        path: A folder of train_data_batch_1(.npz) and so on, or of the published zips of them.
    """

    how_to_get = "get Imagenet64_train_part1_npz.zip and part2 and set data.path to their folder"

    @property
    def source_paths(self) -> list[Path]:
        # What lies deeper is not read, such as data/ and runs/ where data.path is the current folder.
        return sorted(file for file in self.path.iterdir() if file.is_file()) if self.path.is_dir() else [self.path]

    def source(self) -> ImageSource:
        batches = _find_batches(self.path)
        way_out = "get all files of the training images again"
        numbers = [batch.number for batch in batches]
        if not numbers or numbers != list(range(1, len(numbers) + 1)):
            raise FileNotFoundError(f"{self.path} has the batches {', '.join(map(str, numbers)) or 'none'}; {way_out}")
        labels = np.concatenate([batch.labels() for batch in batches])
        width = 3 * self.resolution**2

        def chunks(start: int) -> Iterator[np.ndarray]:
            for batch in batches:
                yield from (rows.reshape(-1, 3, self.resolution, self.resolution) for rows in batch.rows(start, width))
                start = max(0, start - batch.count)

        classes = self._sorted_classes(labels) if self.classes else None
        return ImageSource(
            count=len(labels),
            chunks=chunks,
            labels=classes,
            description=f"train_data_batch_1 to {len(batches)} of downsampled ImageNet",
            preprocessing="none",
            identity=json_hash([(batch.where, batch.size) for batch in batches], self.source_stamp()),
            hashes={
                "classes": lambda: labels_hash(classes),
                "batches": lambda: json_hash([batch.content_hash() for batch in batches]),
            },
        )

    def _sorted_classes(self, labels: np.ndarray) -> np.ndarray:
        path = self.path / _MAPPING
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, without it the labels have no meaning to a teacher; add it (of ILSVRC's devkit) or set "
                "data.num_classes=0 data.conditional=false"
            )
        names = dict(re.findall(r"^(n\d{8}) (\d+)\b", path.read_text(), re.MULTILINE))
        places = {int(number): place for place, (_, number) in enumerate(sorted(names.items()))}
        if sorted(places) != list(range(1, self.classes + 1)):
            raise OSError(
                f"{path} does not number {self.classes} classes from 1 on; get it again or correct data.num_classes"
            )
        if not 1 <= labels.min() <= labels.max() <= self.classes:
            raise ValueError(
                f"{self.path} has labels {labels.min()} to {labels.max()} instead of 1 to {self.classes}; "
                "correct data.num_classes"
            )
        table = np.array([places[number] for number in range(1, self.classes + 1)], np.int64)
        return table[labels - 1]


def _find_batches(path: Path) -> list["_Batch"]:
    """Batches in the order of their numbers."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; set data.path to the folder with the batches' files")
    batches: dict[int, _Batch] = {}
    for file in sorted(path.iterdir()):
        if file.name.endswith(".zip") and "train" in file.name:
            archive = open_zip(file)
            for info in archive.infolist():
                if match := re.fullmatch(r"train_data_batch_(\d+)\.npz", Path(info.filename).name):
                    batches.setdefault(
                        int(match[1]), _Npz(int(match[1]), f"{info.filename} in {file}", info.file_size, info, archive)
                    )
        elif match := re.fullmatch(r"train_data_batch_(\d+)(\.npz)?", file.name):
            kind = _Npz if match[2] else _Pickle
            batches[int(match[1])] = kind(int(match[1]), str(file), file.stat().st_size, file)
    return [batches[number] for number in sorted(batches)]


@dataclass
class _Batch:
    """One file of images and labels.

    Attributes:
        number: Its place among the batches, from 1 on.
        where: What errors call it.
        size: Bytes of the file, or of the archive's member.
        location: The file's path, or the archive's member.
        archive: The zip that it is in, if any.
        count: Its images, known once the labels were read.
    """

    number: int
    where: str
    size: int
    location: Any
    archive: zipfile.ZipFile | None = None
    count: int = 0

    def labels(self) -> np.ndarray:
        """int64 (n,), from 1 on."""
        labels = self._labels()
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
            raise OSError(f"{self.where} holds no labels of images; get it again")
        self.count = len(labels)
        return labels.astype(np.int64)

    def rows(self, start: int, width: int) -> Iterator[np.ndarray]:
        """uint8 (n, width) from image `start` of this batch on, if there are so many."""
        if start < self.count:
            for rows in self._rows(start, width):
                if rows.dtype != np.uint8 or rows.shape[1:] != (width,):
                    raise ValueError(
                        f"{self.where} holds {rows.dtype} rows of {rows.shape[1:]} instead of uint8 ({width},); correct "
                        "data.resolution"
                    )
                yield rows


class _Pickle(_Batch):
    def content_hash(self) -> str:
        return hash_file(self.location)

    def _load(self) -> dict[str, Any]:
        with open(self.location, "rb") as file:
            return unpickle(file, self.where)

    def _labels(self) -> Any:
        return numbers(self._load().get("labels"))

    def _rows(self, start: int, width: int) -> Iterator[np.ndarray]:
        yield np.atleast_2d(numbers(self._load().get("data")))[start:]


class _Npz(_Batch):
    def content_hash(self) -> str:
        """Of the CRC-32 that the .npz itself keeps of its arrays."""
        with self._opened() as archive:
            return json_hash(sorted((info.filename, info.CRC) for info in archive.infolist()))

    def _opened(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.location if self.archive is None else self.archive.open(self.location))

    def _member(self, name: str) -> Iterator[np.ndarray]:
        """An array of the .npz, some rows at a time: a whole batch takes 1.6 GB."""
        try:
            with self._opened() as archive, archive.open(f"{name}.npy") as file:
                info = archive.getinfo(f"{name}.npy")
                check_growth(info.file_size, info.compress_size, name)
                shape, dtype = array_header(file, info.file_size, name)
                row = int(np.prod(shape[1:], dtype=int)) * dtype.itemsize
                for first in range(0, shape[0], _CHUNK):
                    count = min(_CHUNK, shape[0] - first)
                    yield np.frombuffer(file.read(count * row), dtype).reshape(count, *shape[1:])
        except (
            OSError,
            zipfile.BadZipFile,
            LookupError,
            ValueError,
            EOFError,
            NotImplementedError,
            zlib.error,
        ) as error:
            raise OSError(f"{self.where} is damaged or cut short ({error}); get it again") from error

    def _labels(self) -> Any:
        return np.concatenate(list(self._member("labels")))

    def _rows(self, start: int, width: int) -> Iterator[np.ndarray]:
        for rows in self._member("data"):
            if start < len(rows):
                yield rows[start:]
            start = max(0, start - len(rows))

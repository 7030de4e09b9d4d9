"""Images in a zip as EDM's dataset_tool writes it: PNG files in folders, and dataset.json with their classes."""

import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from datamodules.components.file_datamodule import ImageSource, PixelDataModule, labels_hash
from datamodules.components.picture_decoding import THREADS, DecodingRules, decode
from datamodules.components.picture_files import json_hash, members, open_zip, read_member
from stillhouse.checkpoints.bounds import parse_json

_CHUNK = 256  # images


class EDMZip(PixelDataModule):
    """The RGB images of a zip in the order of their names, with their classes where num_classes is above 0.

    Args:
        path: The zip.
    """

    how_to_get = "make the zip with EDM's `python dataset_tool.py --source=... --dest={path}` or set data.path"

    def source(self) -> ImageSource:
        return edm_source(self.path, self.resolution, self.classes)


def edm_source(path: Path, resolution: int, classes: int) -> ImageSource:
    """The images of a zip of EDM's dataset_tool.

    Args:
        path: The zip.
        resolution: That the images must have.
        classes: Number of classes in its dataset.json; 0: the file is ignored.

    Raises:
        OSError: The zip is damaged.
        ValueError: Images or classes are not as asked for.
    """
    archive = open_zip(path)
    infos = members(archive, path)
    names = sorted(name for name in infos if name.lower().endswith(".png"))
    if not names:
        raise ValueError(f"{path} holds no PNG images; make it with EDM's dataset_tool.py")

    def chunks(start: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(start, len(names), _CHUNK):
                images = pool.map(partial(_image, archive, path, resolution), names[first : first + _CHUNK])
                yield np.stack(list(images)).transpose(0, 3, 1, 2)

    labels = _labels(archive, path, names, classes) if classes else None
    pictures = json_hash([(name, infos[name].CRC) for name in names])
    return ImageSource(
        count=len(names),
        chunks=chunks,
        labels=labels,
        description=f"{path.name}, {len(names)} PNG files in the order of their names",
        preprocessing="none",
        identity=pictures,
        hashes={"classes": lambda: labels_hash(labels), "pictures": lambda: pictures},
    )


def _labels(archive: zipfile.ZipFile, path: Path, names: list[str], classes: int) -> np.ndarray:
    try:
        found = parse_json(read_member(archive, "dataset.json", factor=16))["labels"]
        pairs = [] if found is None else [(name, label) for name, label in found]
        listed = dict(pairs)
    except KeyError:  # no such file, or nothing of the kind in it
        pairs, listed = [], {}
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise OSError(f"dataset.json in {path} is damaged ({error}); copy or make the zip again") from error
    way_out = "make the zip of a source with classes, or set data.num_classes=0"
    if not listed:
        raise ValueError(f"{path} has no classes in its dataset.json, data.num_classes={classes}; {way_out}")
    for name, label in pairs:
        if listed[name] != label:
            raise ValueError(
                f"{path}: dataset.json gives {name} the class {label} and also {listed[name]}; correct it or make it again"
            )
    for name in names:
        label = listed.get(name)
        if type(label) is not int or not 0 <= label < classes:
            found = f"dataset.json gives {name} " + ("no class" if label is None else f"the class {label}")
            raise ValueError(f"{path}: {found}, data.num_classes={classes}; {way_out}, or correct it")
    return np.array([listed[name] for name in names], np.int64)


def _image(archive: zipfile.ZipFile, path: Path, side: int, name: str) -> np.ndarray:
    """An image, uint8 (H, W, 3)."""
    where, way_out = f"{name} in {path}", "copy or make the zip again"
    try:
        picture = decode(read_member(archive, name), where, DecodingRules(), way_out, formats=("PNG",))
    except zipfile.BadZipFile as error:
        raise OSError(f"{where} is damaged ({error}); {way_out}") from error
    image = picture.image
    if picture.mode != "RGB" or picture.transparent:
        kind = f"is of mode {picture.mode} instead of RGB" if picture.mode != "RGB" else "has a transparent colour"
        raise ValueError(f"{where} {kind}; convert the source and make the zip again")
    if image.size != (side, side):
        found = "{}x{}".format(*image.size)
        raise ValueError(
            f"{where} has {found} pixels, data.resolution={side}; make the zip with EDM's "
            f"`dataset_tool.py --resolution={side}x{side}` or correct the option"
        )
    return np.asarray(image)

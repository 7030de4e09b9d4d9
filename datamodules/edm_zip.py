"""Images in a zip as EDM's dataset_tool writes it: PNG files in folders, and dataset.json with their classes."""

import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.files import open_zip, read_member
from datamodules.pictures import THREADS
from datamodules.sources import PixelDataModule, Source, identity_of

_CHUNK = 256  # images


class EDMZip(PixelDataModule):
    """The RGB images of the zip `path`, in the order of their names; their classes where num_classes is above 0."""

    get = "make the zip with EDM's `python dataset_tool.py --source=... --dest={path}` or set data.path"

    def source(self) -> Source:
        return edm_source(self.path, self.resolution, self.classes)


def edm_source(path: Path, resolution: int, classes: int) -> Source:
    """Errors: OSError for a damaged zip, ValueError for images or classes other than asked for."""
    archive = open_zip(path)
    infos = {info.filename: info for info in archive.infolist()}
    names = sorted(name for name in infos if name.lower().endswith(".png"))
    if not names:
        raise ValueError(f"{path} holds no PNG images; make it with EDM's dataset_tool.py")

    def chunks(start: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(start, len(names), _CHUNK):
                images = pool.map(partial(_image, archive, path, resolution), names[first : first + _CHUNK])
                yield np.stack(list(images)).transpose(0, 3, 1, 2)

    return Source(
        count=len(names),
        chunks=chunks,
        labels=_labels(archive, path, names, classes) if classes else None,
        description=f"{path.name}, {len(names)} PNG files in the order of their names",
        preprocessing="none",
        identity=identity_of([(name, infos[name].CRC) for name in names]),
    )


def _labels(archive: zipfile.ZipFile, path: Path, names: list[str], classes: int) -> np.ndarray:
    try:
        found = json.loads(read_member(archive, "dataset.json"))["labels"]
        listed = {} if found is None else dict(found)
    except KeyError:  # no such file, or nothing of the kind in it
        listed = {}
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise OSError(f"dataset.json in {path} is damaged ({error}); copy or make the zip again") from error
    way_out = "make the zip of a source with classes, or set data.num_classes=0"
    if not listed:
        raise ValueError(f"{path} has no classes in its dataset.json, data.num_classes={classes}; {way_out}")
    for name in names:
        label = listed.get(name)
        if type(label) is not int or not 0 <= label < classes:
            found = f"dataset.json gives {name} " + ("no class" if label is None else f"the class {label}")
            raise ValueError(f"{path}: {found}, data.num_classes={classes}; {way_out}, or correct it")
    return np.array([listed[name] for name in names], np.int64)


def _image(archive: zipfile.ZipFile, path: Path, side: int, name: str) -> np.ndarray:
    """One image, uint8 (H, W, 3)."""
    try:
        image = Image.open(BytesIO(read_member(archive, name)), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        raise OSError(f"{name} in {path} is damaged ({error}); copy or make the zip again") from error
    if image.mode != "RGB":
        raise ValueError(
            f"{name} in {path} is of mode {image.mode} instead of RGB; convert the source and make the zip again"
        )
    if image.size != (side, side):
        found = "{}x{}".format(*image.size)
        raise ValueError(
            f"{name} in {path} has {found} pixels, data.resolution={side}; make the zip with EDM's "
            f"`dataset_tool.py --resolution={side}x{side}` or correct the option"
        )
    return np.asarray(image)

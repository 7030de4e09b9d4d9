"""Images in a zip as EDM's dataset_tool writes it: PNG files in folders, and dataset.json with their classes."""

import json
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.packing import PackedImages, pack
from metrics.ranks import progress_bar

_CHUNK = 256  # images


class EDMZip(ImageDataModule):
    """The RGB images of the zip `path`, in the order of their names; their classes where num_classes is above 0.

    Without the zip all but the images works: methods that need none train on. Other options as in ImageDataModule.

    Errors, when the images are packed: FileNotFoundError for a missing zip, OSError for a damaged one, ValueError for
    images or classes other than the options say.
    """

    def __init__(self, name: str, root: str = "data", *, path: str, channels: int = 3, **common):
        super().__init__(name, root, channels=channels, **common)
        if channels != 3:
            raise ValueError(f"data.channels={channels}: a zip of EDM's holds RGB images; set data.channels=3")
        self.path = Path(path).expanduser()

    def prepare_data(self) -> None:
        if self.path.exists():
            super().prepare_data()

    def check_source(self) -> None:
        if not (self.folder.exists() or self.path.exists()):
            raise FileNotFoundError(
                f"no {self.name} images: neither {self.folder} nor {self.path} exists; make the zip with EDM's "
                f"`python dataset_tool.py --source=... --dest={self.path}` or set data.path"
            )

    def reference(self) -> PackedImages:
        self.check_source()
        return super().reference()

    def convert(self, folder: Path) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = sorted(name for name in archive.namelist() if name.lower().endswith(".png"))
                if not names:
                    raise ValueError(f"{self.path} holds no PNG images; make it with EDM's dataset_tool.py")
                pack(
                    folder,
                    self._chunks(archive, names),
                    len(names),
                    (self.channels, self.resolution, self.resolution),
                    labels=self._labels(archive, names) if self.classes else None,
                    meta={
                        "name": self.name,
                        "classes": self.classes,
                        "source": f"{self.path.name}, {len(names)} PNG files in the order of their names",
                        "preprocessing": "none",
                    },
                )
        except zipfile.BadZipFile as error:
            raise OSError(f"{self.path} is damaged or cut short ({error}); copy or make it again") from error

    def _labels(self, archive: zipfile.ZipFile, names: list[str]) -> np.ndarray:
        try:
            found = json.loads(_read(archive, "dataset.json"))["labels"]
            classes = {} if found is None else dict(found)
        except KeyError:  # no such file, or nothing of the kind in it
            classes = {}
        except (ValueError, TypeError) as error:
            raise OSError(f"dataset.json in {self.path} is damaged ({error}); copy or make the zip again") from error
        way_out = "make the zip of a source with classes, or set data.num_classes=0"
        if not classes:
            raise ValueError(
                f"{self.path} has no classes in its dataset.json, data.num_classes={self.classes}; {way_out}"
            )
        for name in names:
            label = classes.get(name)
            if type(label) is not int or not 0 <= label < self.classes:
                found = f"dataset.json gives {name} " + ("no class" if label is None else f"the class {label}")
                raise ValueError(f"{self.path}: {found}, data.num_classes={self.classes}; {way_out}, or correct it")
        return np.array([classes[name] for name in names], np.int64)

    def _chunks(self, archive: zipfile.ZipFile, names: list[str]) -> Iterator[np.ndarray]:
        with progress_bar(len(names), f"packing {self.path}") as bar:
            for start in range(0, len(names), _CHUNK):
                chunk = [self._image(archive, name) for name in names[start : start + _CHUNK]]
                yield np.stack(chunk).transpose(0, 3, 1, 2)
                bar.update(len(chunk))

    def _image(self, archive: zipfile.ZipFile, name: str) -> np.ndarray:
        """One image, uint8 (H, W, 3)."""
        try:
            image = Image.open(BytesIO(_read(archive, name)), formats=["PNG"])
            image.load()
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
            raise OSError(f"{name} in {self.path} is damaged ({error}); copy or make the zip again") from error
        if image.mode != "RGB":
            raise ValueError(
                f"{name} in {self.path} is of mode {image.mode} instead of RGB; convert the source and make the zip again"
            )
        if image.size != (self.resolution, self.resolution):
            side, found = self.resolution, "{}x{}".format(*image.size)
            raise ValueError(
                f"{name} in {self.path} has {found} pixels, data.resolution={side}; make the zip with EDM's "
                f"`dataset_tool.py --resolution={side}x{side}` or correct the option"
            )
        return np.asarray(image)


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """Errors: zipfile.BadZipFile for any damage."""
    try:
        return archive.read(name)
    except (zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise zipfile.BadZipFile(f"{name}: {error}") from error

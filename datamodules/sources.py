"""A data set that is made of files on disk: found at a path, packed once, and not needed where no image is."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.files import Files
from datamodules.packing import PackedImages, pack
from datamodules.pictures import Decoder, Prepare
from metrics.ranks import progress_bar


@dataclass(frozen=True)
class Source:
    """Images that can be packed.

    count: N. chunks: from an image number on, uint8 (n, C, H, W). labels: int64 (N,) or None. description, preprocessing:
    for meta.json. identity: a hash of all that decides the pixels and that can be known without reading them; None where
    packing is so quick that a killed process' work is not worth going on with.
    """

    count: int
    chunks: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None
    description: str
    preprocessing: str
    identity: str | None


def identity_of(*parts: object) -> str:
    """SHA-256 (hex) of what JSON can hold."""
    return sha256(json.dumps(parts).encode()).hexdigest()


def picture_source(name: str, files: Files, prepare: Prepare, preprocessing: str, labels: np.ndarray | None) -> Source:
    """`files` as `prepare` makes them; says at the end how many were no RGB."""

    def chunks(start: int) -> Iterator[np.ndarray]:
        decoder = Decoder(prepare)
        for _, pixels in decoder.chunks(files.contents(start)):
            yield pixels
        decoder.report(name)

    description = f"{files.path.name}, {len(files)} pictures in the order of their paths, list {files.identity[:16]}"
    return Source(len(files), chunks, labels, description, preprocessing, files.identity)


class FileDataModule(ImageDataModule):
    """Images that come from `path`; without it all but the images works: methods that need none train on.

    `url`, where `path` can be fetched from, is for the error's way out alone. Other options as in ImageDataModule.

    Errors, when the images are packed: FileNotFoundError for a missing source, OSError for a damaged one, ValueError for
    images or classes other than the options say.
    """

    get: str
    """How to get the files, for the error's way out: follows "neither ... exists; "."""

    def __init__(
        self, name: str, root: str = "data", *, path: str, url: str | None = None, channels: int = 3, **common
    ):
        super().__init__(name, root, channels=channels, **common)
        if channels != 3:
            raise ValueError(f"data.channels={channels}: {name} is packed as RGB images; set data.channels=3")
        self.path = Path(path).expanduser()
        self.url = url

    def prepare_data(self) -> None:
        if self.path.exists():
            super().prepare_data()

    def check_source(self) -> None:
        if not (self.folder.exists() or self.path.exists()):
            way_out = f"add download=true to fetch {self.url}, or put the file there" if self.url else self.get
            raise FileNotFoundError(
                f"no {self.name} images: neither {self.folder} nor {self.path} exists; "
                + way_out.format(path=self.path, resolution=self.resolution)
            )

    def reference(self) -> PackedImages:
        self.check_source()
        return super().reference()


class PixelDataModule(FileDataModule):
    """Images that are packed as their pixels."""

    @abstractmethod
    def source(self) -> Source:
        """What lies at `path`, in whichever of its layouts."""

    def convert(self, folder: Path) -> None:
        source = self.source()

        def chunks(start: int) -> Iterator[np.ndarray]:
            with progress_bar(source.count - start, f"packing {self.path}") as bar:
                for chunk in source.chunks(start):
                    yield chunk
                    bar.update(len(chunk))

        pack(
            folder,
            chunks,
            source.count,
            (self.channels, self.resolution, self.resolution),
            labels=source.labels,
            meta={
                "name": self.name,
                "classes": self.classes,
                "source": source.description,
                "preprocessing": source.preprocessing,
            },
            identity=source.identity,
        )

"""A data set that is made of files on disk: found at a path, packed once, and not needed where no image is."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.components.disk_space import write_json
from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import PackedImages, pack, read_meta, way_out
from datamodules.components.picture_decoding import Decoder, Prepare, Rules
from datamodules.components.picture_files import Files, files_below, identity_of
from stillhouse.ranks import progress_bar

Hashes = dict[str, Callable[[], str]]
"""What a source is made of, in words, to its SHA-256 (hex); those that are had at once come first."""


@dataclass(frozen=True)
class ImageSource:
    """Images that can be packed.

    count: N. chunks: from an image number on, uint8 (n, C, H, W). labels: int64 (N,) or None. description, preprocessing:
    for meta.json. identity: a hash of all that decides the pixels and that can be known without reading them; None where
    packing is so quick that a killed process' work is not worth going on with. hashes: of the content, so that a copy is
    known as what was packed; once the images have been read they cost little.
    """

    count: int
    chunks: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None
    description: str
    preprocessing: str
    identity: str | None
    hashes: Hashes


def classes_hash(labels: np.ndarray | None) -> str:
    return sha256(b"none" if labels is None else labels.astype("<i8").tobytes()).hexdigest()


def picture_source(
    name: str, files: Files, rules: Rules, prepare: Prepare, preprocessing: str, labels: np.ndarray | None
) -> ImageSource:
    """`files` as `prepare` makes them; says at the end what was left out, and which were no plain RGB."""

    def chunks(start: int) -> Iterator[np.ndarray]:
        files.report(name)
        decoder = Decoder(prepare, rules)
        for _, pixels in decoder.chunks(files.contents(start)):
            yield pixels
        decoder.report(name)

    return ImageSource(
        count=len(files),
        chunks=chunks,
        labels=labels,
        description=f"{files.path.name}, {len(files)} pictures in the order of their paths",
        preprocessing=preprocessing,
        identity=files.identity,
        hashes={"classes": lambda: classes_hash(labels), **files.hashes()},
    )


class FileDataModule(ImageDataModule):
    """Images that come from `path`; without it all but the images works: methods that need none train on.

    `url`, where `path` can be fetched from, is for the error's way out alone. Other options as in ImageDataModule.

    meta.json keeps `options` and what the source was: while sizes and times of its files stay, it counts as the same, else
    its content is read and compared. So a copy or another place of the same content is none the worse for it, and content
    that was replaced is seen unless size and time were kept as well.

    Errors, when the images are packed: FileNotFoundError for a missing source, OSError for a damaged one, ValueError for
    images or classes other than the options say. Afterwards: ValueError where options or source are no more those of what
    was packed.
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
        self._compared = False

    def prepare_data(self) -> None:
        if self.path.exists():
            super().prepare_data()

    @property
    def options(self) -> dict[str, Any]:
        """What decides pixels or classes beside the source, by the names of options."""
        return {}

    @property
    def places(self) -> list[Path]:
        """All files and folders that are read."""
        return [self.path]

    @abstractmethod
    def hashes(self) -> Hashes:
        """Of the source as it is now."""

    def provenance(self, stamp: str, hashes: Hashes) -> dict[str, Any]:
        """What meta.json keeps of options and source."""
        return {
            "options": self.options,
            "source_stamp": stamp,
            "source_sha256": {what: value() for what, value in hashes.items()},
        }

    def stamp(self) -> str:
        """A hash of the sizes and times of all files, which takes no reading."""
        stats = []
        for place in self.places:
            files = files_below(place)[0] if place.is_dir() else {"": place.stat()} if place.is_file() else {}
            stats.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files.items())])
        return identity_of(stats)

    def check_source(self) -> None:
        if self.folder.exists():
            if not self._compared:
                self._check_unchanged()
            self._compared = True
        elif not self.path.exists():
            get = f"add download=true to fetch {self.url}, or put the file there" if self.url else self.get
            raise FileNotFoundError(
                f"no {self.name} images: neither {self.folder} nor {self.path} exists; "
                + get.format(path=self.path, resolution=self.resolution)
            )

    def _check_unchanged(self) -> None:
        meta = read_meta(self.folder)
        self.check_sizes(meta)
        if "source_sha256" not in meta:
            print(
                f"{self.folder} was packed by an older version, which did not note what it was packed of: changes of "
                f"{self.path} are not seen; to have them seen, {way_out(self.folder)}",
                flush=True,
            )
            return
        for option, value in self.options.items():
            if meta["options"].get(option) != value:
                raise ValueError(
                    f"data.{option}={value}, but {self.folder} was packed with {meta['options'].get(option)}: "
                    f"{way_out(self.folder)}, or set data.name"
                )
        if not self.path.exists() or (stamp := self.stamp()) == meta["source_stamp"]:
            return
        print(f"{self.path}: sizes or times of files differ from when {self.folder} was packed; comparing", flush=True)
        hashes, packed = self.hashes(), meta["source_sha256"]
        if set(hashes) != set(packed):
            raise ValueError(
                f"{self.path} is of another kind than what {self.folder} was packed of ({meta['source']}) and can't be "
                f"compared with it: {way_out(self.folder)}, set data.path back, or set data.name"
            )
        other = next((what for what, value in hashes.items() if value() != packed[what]), None)
        if other is not None:
            raise ValueError(
                f"{self.path} has changed since {self.folder} was packed of it ({meta['source']}; now other {other}): "
                f"{way_out(self.folder)}, or set data.name"
            )
        with suppress(OSError):  # where it can't be kept the next one compares again
            write_json(self.folder / "meta.json", {**meta, "source_stamp": stamp})

    def reference(self) -> PackedImages:
        if self._packed is None:
            self.check_source()
        return super().reference()


class PictureDataModule(FileDataModule):
    """Images that are encoded pictures in any format; depth, background and max_aspect as in `pictures.Rules`."""

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        path: str,
        depth: str = "refuse",
        background: str | list[int] = "white",
        max_aspect: float | None = None,
        **common,
    ):
        super().__init__(name, root, path=path, **common)
        self.rules = Rules(depth, background, max_aspect)

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, **self.rules.options}


class PixelDataModule(FileDataModule):
    """Images that are packed as their pixels."""

    @abstractmethod
    def source(self) -> ImageSource:
        """What lies at `path`, in whichever of its layouts."""

    def hashes(self) -> Hashes:
        return self.source().hashes

    def convert(self, folder: Path) -> None:
        stamp, source = self.stamp(), self.source()
        if (table := self.class_table()) is not None:
            print(f"{self.name}: {table}", flush=True)

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
            identity=source.identity and identity_of(source.identity, self.options),
            provenance=lambda: self.provenance(stamp, source.hashes),
        )

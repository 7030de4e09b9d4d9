"""Data sets made of files on disk: packed once, compared with their source later, not needed where no image is."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.components.encoded_images import EncodedImages, pack_encoded
from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import PackedImages, pack, read_meta, way_out
from datamodules.components.picture_decoding import Decoder, DecodingRules, Preprocess
from datamodules.components.picture_files import PictureFiles, PictureSequence, files_below, json_hash
from stillhouse.files import write_json
from stillhouse.ranks import progress_bar

ContentHashes = dict[str, Callable[[], str]]
"""What a source consists of, in words, to a function that gives its SHA-256 (hex); the cheap ones come first."""


@dataclass(frozen=True)
class ImageSource:
    """Images that can be packed.

    Attributes:
        count: N, the number of images.
        chunks: Gives the images from a number on, as chunks uint8 (n, C, H, W).
        labels: int64 (N,), or None where the images have no classes.
        description: What the images were made of, for meta.json.
        preprocessing: What was done to them, for meta.json.
        identity: A hash (hex) of everything that decides the pixels and can be known without reading them, by which the
            packing of a killed process is continued; None where packing is quick, and begins anew.
        hashes: Of the content, by which a copy of the source is recognised; cheap once the images have been read.
    """

    count: int
    chunks: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None
    description: str
    preprocessing: str
    identity: str | None
    hashes: ContentHashes


def labels_hash(labels: np.ndarray | None) -> str:
    """SHA-256 (hex) of the labels (N,), or of their absence."""
    return sha256(b"none" if labels is None else labels.astype("<i8").tobytes()).hexdigest()


def array_source(
    images: np.ndarray, labels: np.ndarray | None, description: str, preprocessing: str = "none"
) -> ImageSource:
    """Images that fit into memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: Integers (N,) from 0 on, or None.
        description: What the images were made of, for meta.json.
        preprocessing: What was done to them, for meta.json.
    """
    return ImageSource(
        count=len(images),
        chunks=lambda start: iter([images[start:]]),
        labels=labels,
        description=description,
        preprocessing=preprocessing,
        identity=None,
        hashes={
            "classes": lambda: labels_hash(labels),
            "images": lambda: sha256(np.ascontiguousarray(images)).hexdigest(),
        },
    )


def picture_source(
    name: str,
    files: PictureFiles,
    rules: DecodingRules,
    preprocess: Preprocess,
    preprocessing: str,
    labels: np.ndarray | None,
) -> ImageSource:
    """Images that `preprocess` makes of picture files; prints what was left out, and which were no plain RGB.

    Args:
        name: The data set's, for what is printed.
        files: The pictures.
        rules: What becomes of pictures that are not plain RGB.
        preprocess: From a decoded picture to one of the data set's resolution.
        preprocessing: The same in words, for meta.json.
        labels: int64 (N,), or None.
    """

    def chunks(start: int) -> Iterator[np.ndarray]:
        files.report(name)
        decoder = Decoder(preprocess, rules)
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
        hashes={"classes": lambda: labels_hash(labels), **files.content_hashes()},
    )


class FileDataModule(ImageDataModule):
    """Images that come from the file or folder `path`; without it methods that need no images still train.

    meta.json keeps the options that decide pixels, and what the source was. While sizes and times of its files stay the same,
    the source counts as unchanged; otherwise its content is read and compared. So a copy, or the same content in another
    place, is accepted, and content that was replaced is noticed unless its size and time were kept as well.

    Args:
        name, root: As in `ImageDataModule`.
        path: The source.
        url: Where `path` can be fetched from, for error messages; `download=true` fetches it.
        channels: None: `source_channels`; else that or one of `other_channels`.
        common: The other options of `ImageDataModule`.

    Raises:
        FileNotFoundError: While packing, where the source is missing.
        OSError: While packing, where the source is damaged.
        ValueError: While packing, where images or classes are not as the options say; afterwards, where options or source
            are no longer those of the packed images.
    """

    how_to_get: ClassVar[str]
    """How to get the files, for error messages; follows "neither ... exists; "."""
    source_channels: ClassVar[int] = 3
    """Channels of the images in the source."""
    other_channels: ClassVar[tuple[int, ...]] = ()
    """Channels that it can be packed with as well."""
    test_files: ClassVar[tuple[str, ...]] = ()
    """Published files of the test images, which are packed into ROOT/NAME/test."""

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        path: str,
        url: str | None = None,
        channels: int | None = None,
        **common: Any,
    ):
        super().__init__(name, root, channels=self.source_channels if channels is None else channels, **common)
        if self.channels not in (possible := (self.source_channels, *self.other_channels)):
            raise ValueError(
                f"data.channels={channels}: {name} is packed with {' or '.join(map(str, possible))} channels; "
                f"set data.channels={self.source_channels}"
            )
        self.path = Path(path).expanduser()
        self.url = url
        self._compared = False

    @property
    def pixel_options(self) -> dict[str, Any]:
        """The options that decide pixels or classes, beside the source, by name."""
        return {}

    @property
    def source_paths(self) -> list[Path]:
        """All files and folders that are read."""
        return [self.path]

    @property
    def place(self) -> str:
        """Where the source is, for messages."""
        return str(self.path)

    def missing_source(self) -> Path | None:
        """What of the source is not there; None where nothing is missing."""
        return None if self.path.exists() else self.path

    def has_source(self) -> bool:
        """Whether the source is there, so that it can be packed, or compared with what was packed."""
        return self.missing_source() is None

    def way_to_get(self, missing: Path) -> str:
        """What to do about a file or folder of the source that is missing."""
        if self.url:
            return f"add download=true to fetch {self.url}, or put the file there"
        return self.how_to_get.format(path=missing, resolution=self.resolution)

    @abstractmethod
    def content_hashes(self) -> ContentHashes:
        """The hashes of the source as it is now."""

    def provenance(self, stamp: str, hashes: ContentHashes) -> dict[str, Any]:
        """What meta.json keeps of options and source."""
        return {
            "options": self.pixel_options,
            "source_stamp": stamp,
            "source_sha256": {what: value() for what, value in hashes.items()},
        }

    def source_stamp(self) -> str:
        """A hash of sizes and times of all files, which are not read for it."""
        stats = []
        for path in self.source_paths:
            files = files_below(path)[0] if path.is_dir() else {"": path.stat()} if path.is_file() else {}
            stats.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files.items())])
        return json_hash(stats)

    def prepare_data(self) -> None:
        if self.has_source():
            super().prepare_data()

    def reference(self) -> PackedImages:
        if self._packed is None:
            self.check_source()
        return super().reference()

    def check_source(self) -> None:
        if self.folder.exists():
            if not self._compared:
                self._check_unchanged()
            self._compared = True
        elif (missing := self.missing_source()) is not None:
            raise FileNotFoundError(
                f"no {self.name} images: neither {self.folder} nor {missing} exists; {self.way_to_get(missing)}"
            )

    def _check_unchanged(self) -> None:
        meta = read_meta(self.folder)
        self.check_sizes(meta)
        if "source_sha256" not in meta:
            print(
                f"{self.folder} was packed by an older version, which did not record its source: changes of {self.place} are "
                f"not seen; to have them seen, {way_out(self.folder)}",
                flush=True,
            )
            return
        for option, value in self.pixel_options.items():
            if meta["options"].get(option) != value:
                raise ValueError(
                    f"data.{option}={value}, but {self.folder} was packed with {meta['options'].get(option)}: "
                    f"{way_out(self.folder)}, or set data.name"
                )
        if not self.has_source() or (stamp := self.source_stamp()) == meta["source_stamp"]:
            return
        print(f"{self.place}: sizes or times of files differ from when {self.folder} was packed; comparing", flush=True)
        hashes, packed = self.content_hashes(), meta["source_sha256"]
        if set(hashes) != set(packed):
            raise ValueError(
                f"{self.place} is of another kind than what {self.folder} was packed of ({meta['source']}) and can't be "
                f"compared with it: {way_out(self.folder)}, set data.path back, or set data.name"
            )
        other = next((what for what, value in hashes.items() if value() != packed[what]), None)
        if other is not None:
            raise ValueError(
                f"{self.place} has changed since {self.folder} was packed of it ({meta['source']}; now other {other}): "
                f"{way_out(self.folder)}, or set data.name"
            )
        with suppress(OSError):  # where it can't be kept the next process compares again
            write_json(self.folder / "meta.json", {**meta, "source_stamp": stamp}, sort_keys=True)


class PixelDataModule(FileDataModule):
    """Images that are packed as pixels: a data set of one's own defines `source` and `how_to_get`."""

    @abstractmethod
    def source(self) -> ImageSource:
        """What lies at `path`, in any of its layouts."""

    def content_hashes(self) -> ContentHashes:
        return self.source().hashes

    def convert(self, folder: Path) -> None:
        stamp, source = self.source_stamp(), self.source()
        if (table := self.class_table()) is not None:
            print(f"{self.name}: {table}", flush=True)

        def chunks(start: int) -> Iterator[np.ndarray]:
            with progress_bar(source.count - start, f"packing {self.place}") as bar:
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
            identity=source.identity and json_hash(source.identity, self.pixel_options),
            provenance=lambda: self.provenance(stamp, source.hashes),
        )


class PictureDataModule(FileDataModule):
    """Images that come from encoded pictures of any format.

    Args:
        depth, background, max_aspect: As in `picture_decoding.DecodingRules`.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        path: str,
        depth: str = "refuse",
        background: str | list[int] = "white",
        max_aspect: float | None = None,
        **common: Any,
    ):
        super().__init__(name, root, path=path, **common)
        self.rules = DecodingRules(depth, background, max_aspect)

    @property
    def pixel_options(self) -> dict[str, Any]:
        return {**super().pixel_options, **self.rules.options}


class EncodedDataModule(PictureDataModule):
    """Pictures that stay encoded, and are decoded and cut whenever they are fetched, without classes.

    A subclass defines `pictures` and `how_to_get`. What it serves is always the middle square.
    """

    packed_type = EncodedImages

    @abstractmethod
    def pictures(self) -> PictureSequence:
        """The pictures at `path`, in any of its layouts."""

    def content_hashes(self) -> ContentHashes:
        return self.pictures().content_hashes()

    def convert(self, folder: Path) -> None:
        if self.classes:
            raise ValueError(
                f"data.num_classes={self.classes}: {self.name} is packed as encoded pictures, which have no classes; "
                "set data.num_classes=0"
            )
        stamp, pictures = self.source_stamp(), self.pictures()

        def contents(start: int) -> Iterator[tuple[str, bytes]]:
            pictures.report(self.name)
            with progress_bar(len(pictures) - start, f"packing {self.place}") as bar:
                for picture in pictures.contents(start):
                    yield picture
                    bar.update()

        pack_encoded(
            folder,
            contents,
            len(pictures),
            sum(pictures.sizes),
            self.resolution,
            meta={
                "name": self.name,
                "classes": 0,
                "source": f"{self.path.name}, {len(pictures)} encoded pictures",
            },
            rules=self.rules,
            identity=pictures.identity,
            provenance=lambda: self.provenance(stamp, pictures.content_hashes()),
        )

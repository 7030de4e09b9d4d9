"""A data set as one memory-mapped uint8 array: packed once, then whole batches are fetched by index."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.components.disk_space import folder_size, require_space
from datamodules.components.npy_files import check_npy, npy_header, write_npy
from datamodules.components.partial_folder import append_resumably, claim_folder
from stillhouse.checkpoints.block_hashes import BlockHashes, unchanged
from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import write_json

FORMAT = 1
DESCRIPTION = {"name", "classes", "source", "preprocessing"}
MARGIN = 1 << 16  # bytes for headers, meta.json and the file system's own bookkeeping


def pack(
    folder: str | Path,
    images: np.ndarray | Iterable[np.ndarray] | Callable[[int], Iterable[np.ndarray]],
    count: int,
    shape: tuple[int, int, int],
    *,
    labels: np.ndarray | None = None,
    meta: dict[str, Any],
    identity: str | None = None,
    provenance: Callable[[], dict[str, Any]] = dict,
) -> "PackedImages":
    """Write images into `folder`, which appears complete or not at all, and stays as it is where it exists.

    Another process that packs the same folder is waited for. With chunks from a function and an `identity`, the work of a
    killed process is continued.

    Args:
        folder: The packed folder.
        images: One uint8 array (N, C, H, W), an iterable of such chunks, or a function that gives the chunks from an image on.
        count: N.
        shape: (C, H, W), H = W.
        labels: Integers (N,).
        meta: What meta.json says: name, classes (0 without labels), source and preprocessing.
        identity: Names the content of the source.
        provenance: Gives further entries of meta.json once all images have been read.

    Raises:
        ValueError: Images or labels are not as announced.
        OSError: The disk is too small.
    """
    folder = Path(folder)
    channels, height, width = shape
    if height != width:
        raise ValueError(f"images must be square, got shape {tuple(shape)}")
    check_meta(meta)
    labels = _checked_labels(labels, count, meta["classes"])

    def blocks(start: int) -> Iterator[tuple[int, dict[str, memoryview]]]:
        chunks = images(start) if callable(images) else [images] if isinstance(images, np.ndarray) else images
        for chunk in _checked(chunks, count, shape, start):
            yield len(chunk), {"images.npy": memoryview(np.ascontiguousarray(chunk))}

    with claim_folder(folder) as partial:
        if partial is not None:
            require_space(folder, count * (channels * height * width + 8) + MARGIN - folder_size(partial))
            announced = (identity, list(shape), count, meta)
            headers = {"images.npy": npy_header((count, *shape), np.uint8)}
            hashes = append_resumably(partial, headers, identity and json.dumps(announced), blocks)
            if labels is not None:
                hashes["labels.npy"] = write_npy(partial / "labels.npy", (count,), np.dtype("<i8"), [labels])
            sizes = {"count": count, "channels": channels, "resolution": height}
            digests = {
                "sha256": hashes["images.npy"].whole,
                "labels_sha256": None if labels is None else hashes["labels.npy"].whole,
            }
            content = {"format": FORMAT, **meta, **provenance(), **sizes, **digests, **block_hashes(hashes)}
            write_json(partial / "meta.json", content, sort_keys=True)
    return PackedImages(folder)


def block_hashes(hashes: Mapping[str, BlockHashes]) -> dict[str, Any]:
    """The entry of meta.json on the blocks of long files, by the files' names."""
    blocks = {name: of.blocks for name, of in hashes.items() if of.blocks}
    return {"blocks": blocks} if blocks else {}


def check_file(path: Path, offset: int, size: int, sha256: str, meta: Mapping[str, Any], everything: bool) -> None:
    """Raise OSError where the bytes of a packed file are not those of its hashes, as far as `unchanged` compares them."""
    try:
        right = unchanged(path, offset, size, sha256, meta.get("blocks", {}).get(path.name, ()), everything=everything)
    except (AttributeError, TypeError):
        right = False  # meta.json holds no lists of hashes
    if not right:
        raise OSError(f"{path} is damaged, its SHA-256 is not meta.json's: {way_out(path.parent)}")


def check_meta(meta: dict[str, Any]) -> None:
    """Raise ValueError where the description of a data set lacks something, or has more than it should."""
    if set(meta) != DESCRIPTION:
        raise ValueError(f"meta must say {', '.join(sorted(DESCRIPTION))}, got {', '.join(sorted(meta)) or 'nothing'}")


def _checked(chunks: Iterable[np.ndarray], count: int, shape: tuple[int, ...], total: int) -> Iterable[np.ndarray]:
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.shape[1:] != tuple(shape):
            raise ValueError(f"images must be uint8 (n, {', '.join(map(str, shape))}), got {chunk.dtype} {chunk.shape}")
        total += len(chunk)
        if total > count:
            break
        yield chunk
    if total != count:
        raise ValueError(f"count={count} images were announced, the source gave {'more' if total > count else total}")


def _checked_labels(labels: np.ndarray | None, count: int, classes: int) -> np.ndarray | None:
    if labels is None:
        if classes:
            raise ValueError(f"classes={classes} need labels; pass labels or classes=0")
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers of shape ({count},), got {labels.dtype} {labels.shape}")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be in [0, {classes}), got {labels.min()} to {labels.max()}")
    return labels.astype("<i8")


def check_indices(indices: np.ndarray, count: int, folder: Path) -> None:
    """Raise IndexError for indices (B,) outside of [0, count)."""
    if len(indices) and not 0 <= indices.min() <= indices.max() < count:
        raise IndexError(f"indices {indices.min()} to {indices.max()} exceed the {count} images of {folder}")


def way_out(folder: Path) -> str:
    """What to do about a damaged folder, for errors."""
    return f"delete the folder {folder} and run again"


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of a packed folder's meta.json.

    Raises:
        FileNotFoundError: Nothing is packed there.
        OSError: The file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: nothing is packed there yet")
    path = folder / "meta.json"
    try:
        meta = parse_json(path.read_bytes())
        complete = meta["format"] == FORMAT and {"count", "channels", "resolution", *DESCRIPTION} <= set(meta)
        complete = complete and {"sha256", "labels_sha256"} <= set(meta)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {way_out(folder)}") from None
    except (ValueError, TypeError, KeyError):
        complete = False
    if not complete:
        raise OSError(f"{path} is damaged or of another version: {way_out(folder)}")
    return meta


class PackedImages:
    """The images of a packed folder.

    Opening compares header and size of each file with meta.json, `verify` compares the content too. Pickled, it is the
    folder's path.

    Attributes:
        images: uint8 (N, C, H, W), mapped on first use.
        labels: int64 (N,), or None.
        meta: The content of meta.json.
        hash: SHA-256 of the pixel bytes, hex.

    Raises:
        FileNotFoundError: Nothing is packed there.
        OSError: Files are damaged or do not belong together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._way_out = way_out(self.folder)
        self.meta = read_meta(self.folder)
        side = self.meta["resolution"]
        self.shape = (self.meta["count"], self.meta["channels"], side, side)
        self._offset = check_npy(self.folder / "images.npy", self.shape, np.uint8, self._way_out)
        self._images: np.memmap | None = None
        self.labels: np.ndarray | None = None
        if self.meta["labels_sha256"]:
            path = self.folder / "labels.npy"
            self._labels_offset = check_npy(path, self.shape[:1], np.dtype("<i8"), self._way_out)
            self.labels = np.load(path)
            if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.meta["classes"]:
                found = f"{self.labels.min()} to {self.labels.max()}"
                raise OSError(f"{path} is damaged, labels {found} of {self.meta['classes']} classes: {self._way_out}")

    def __reduce__(self) -> tuple:
        return PackedImages, (self.folder.absolute(),)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def hash(self) -> str:
        return self.meta["sha256"]

    @property
    def images(self) -> np.memmap:
        if self._images is None:
            path = self.folder / "images.npy"
            self._images = np.memmap(path, np.uint8, mode="r", offset=self._offset, shape=self.shape)
        return self._images

    def verify(self, everything: bool = True) -> None:
        """Raise OSError where pixels or labels are not those that were packed; without `everything` compare some of them."""
        check_file(self.folder / "images.npy", self._offset, math.prod(self.shape), self.hash, self.meta, everything)
        if self.labels is not None:
            path, digest = self.folder / "labels.npy", self.meta["labels_sha256"]
            check_file(path, self._labels_offset, 8 * len(self), digest, self.meta, everything)

    def fetch(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Copies of images, uint8 (B, C, H, W), and of labels, int64 (B,) or None, in the order of `indices` (B,)."""
        check_indices(indices, len(self), self.folder)
        images = self.images.view(np.ndarray)
        # A byte per page in rising order first, so that a disk reads a cold file from front to back.
        _ = images.reshape(len(self), -1)[np.sort(indices), ::4096]
        batch = np.empty((len(indices), *self.shape[1:]), np.uint8)
        np.take(images, indices, axis=0, out=batch, mode="clip")  # mode='raise' would make a second copy
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return torch.from_numpy(batch), labels

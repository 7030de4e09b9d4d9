"""A data set as one memory-mapped uint8 array: packed once, then whole batches are fetched by index."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.storage import check_npy, hash_range, require_space, scratch, sweep, write_json, write_npy

FORMAT = 1
_DESCRIPTION = {"name", "classes", "source", "preprocessing"}
_MARGIN = 1 << 16  # bytes for headers, meta.json and the file system's own bookkeeping


def pack(
    folder: str | Path,
    images: np.ndarray | Iterable[np.ndarray],
    count: int,
    shape: tuple[int, int, int],
    *,
    labels: np.ndarray | None = None,
    meta: dict[str, Any],
) -> "PackedImages":
    """Write `count` images of `shape` (C, H, W) into `folder`, which appears complete or not at all.

    `images` is one uint8 array (N, C, H, W) or an iterable of such chunks, `labels` integers (N,). `meta` says name,
    classes (0 without labels), source and preprocessing. Where another process was faster, its folder stays and this
    copy goes.

    Errors: ValueError for images or labels other than announced, OSError for a disk that is too small.
    """
    folder = Path(folder)
    channels, height, width = shape
    if height != width:
        raise ValueError(f"images must be square, got shape {tuple(shape)}")
    if set(meta) != _DESCRIPTION:
        raise ValueError(f"meta must say {', '.join(sorted(_DESCRIPTION))}, got {', '.join(sorted(meta)) or 'nothing'}")
    labels = _checked_labels(labels, count, meta["classes"])
    require_space(folder, count * (channels * height * width + 8) + _MARGIN)
    sweep(folder.parent, folder.name)
    with scratch(folder) as temporary:
        temporary.mkdir()
        chunks = [images] if isinstance(images, np.ndarray) else images
        digest = write_npy(temporary / "images.npy", (count, *shape), np.uint8, _checked(chunks, count, shape))
        labels_digest = None
        if labels is not None:
            labels_digest = write_npy(temporary / "labels.npy", (count,), np.dtype("<i8"), [labels])
        sizes = {"count": count, "channels": channels, "resolution": height}
        hashes = {"sha256": digest, "labels_sha256": labels_digest}
        write_json(temporary / "meta.json", {"format": FORMAT, **meta, **sizes, **hashes})
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    return PackedImages(folder)


def _checked(chunks: Iterable[np.ndarray], count: int, shape: tuple[int, ...]) -> Iterable[np.ndarray]:
    total = 0
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


class PackedImages:
    """A packed folder: `images` uint8 (N, C, H, W) mapped on first use, `labels` int64 (N,) or None, `meta` a dict.

    Opening compares header and size of each file with meta.json, `verify` the content too; a pickle is the folder's path.

    Errors: FileNotFoundError where nothing is packed, OSError for files that are damaged or do not belong together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} does not exist: nothing is packed there yet")
        self._way_out = f"delete the folder {self.folder} and run again"
        self.meta = self._read_meta()
        side = self.meta["resolution"]
        self.shape = (self.meta["count"], self.meta["channels"], side, side)
        self._offset = check_npy(self.folder / "images.npy", self.shape, np.uint8, self._way_out)
        self._images: np.memmap | None = None
        self.labels: np.ndarray | None = None
        if self.meta["labels_sha256"]:
            path = self.folder / "labels.npy"
            self._labels_offset = check_npy(path, self.shape[:1], np.dtype("<i8"), self._way_out)
            self.labels = np.load(path)

    def _read_meta(self) -> dict[str, Any]:
        path = self.folder / "meta.json"
        try:
            meta = json.loads(path.read_bytes())
            complete = meta["format"] == FORMAT and {"count", "channels", "resolution", *_DESCRIPTION} <= set(meta)
            complete = complete and {"sha256", "labels_sha256"} <= set(meta)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: {self._way_out}") from None
        except (ValueError, TypeError, KeyError):
            complete = False
        if not complete:
            raise OSError(f"{path} is damaged or of another version: {self._way_out}")
        return meta

    def __reduce__(self) -> tuple:
        return PackedImages, (self.folder.absolute(),)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def hash(self) -> str:
        """SHA-256 of the pixel bytes, hex."""
        return self.meta["sha256"]

    @property
    def images(self) -> np.memmap:
        if self._images is None:
            path = self.folder / "images.npy"
            self._images = np.memmap(path, np.uint8, mode="r", offset=self._offset, shape=self.shape)
        return self._images

    def verify(self) -> None:
        """Errors: OSError where pixels or labels are not those that were packed."""
        files = [("images.npy", self._offset, np.prod(self.shape, dtype=int), self.hash)]
        if self.labels is not None:
            files.append(("labels.npy", self._labels_offset, 8 * len(self), self.meta["labels_sha256"]))
        for name, offset, size, expected in files:
            if hash_range(self.folder / name, offset, int(size)) != expected:
                raise OSError(f"{self.folder / name} is damaged, its SHA-256 is not meta.json's: {self._way_out}")

    def fetch(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) or None, in the order of `indices` (B,); fresh memory."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"indices {indices.min()} to {indices.max()} exceed the {len(self)} images of {self.folder}"
            )
        images = self.images.view(np.ndarray)
        # A byte per page in rising order first: a cold file is read as a disk likes it, the copy keeps the caller's order.
        _ = images.reshape(len(self), -1)[np.sort(indices), ::4096]
        batch = np.empty((len(indices), *self.shape[1:]), np.uint8)
        np.take(images, indices, axis=0, out=batch, mode="clip")  # 'raise' would buffer: a second copy
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return torch.from_numpy(batch), labels

"""Data sets too large as pixels: the encoded pictures one after the other, decoded and cut whenever they are fetched."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.components.disk_space import folder_size, require_space
from datamodules.components.npy_files import check_npy, write_npy
from datamodules.components.packed_images import (
    FORMAT,
    MARGIN,
    block_hashes,
    check_file,
    check_indices,
    check_meta,
    read_meta,
    way_out,
)
from datamodules.components.partial_folder import append_resumably, claim_folder
from datamodules.components.picture_decoding import CENTRE_CROP, THREADS, Decoder, DecodingRules, centre_crop, decode
from stillhouse.files import write_json


def pack_encoded(
    folder: str | Path,
    contents: Callable[[int], Iterable[tuple[str, bytes]]],
    count: int,
    size: int,
    resolution: int,
    *,
    meta: dict[str, Any],
    rules: DecodingRules,
    identity: str,
    provenance: Callable[[], dict[str, Any]] = dict,
) -> "EncodedImages":
    """Write encoded pictures into `folder`, as `packed_images.pack` writes pixels.

    Each picture is decoded once, so that a damaged one is found now. What is fetched is always the middle square.

    Args:
        folder: The packed folder.
        contents: Gives (name for errors, content) of each picture from a number on.
        count: N, the number of pictures.
        size: About the number of bytes of all pictures.
        resolution: Of the images that are fetched.
        meta: What meta.json says: name, classes (0) and source.
        rules: How the pictures are decoded.
        identity: Names the content of the source.
        provenance: Gives further entries of meta.json once all pictures have been read.

    Raises:
        OSError: Pictures are damaged, or the disk is too small.
        ValueError: There are more or fewer pictures than announced.
    """
    folder = Path(folder)
    meta = {**meta, "preprocessing": CENTRE_CROP}
    check_meta(meta)
    decoder = Decoder(lambda image, where: centre_crop(image, resolution), rules)

    def blocks(start: int) -> Iterator[tuple[int, dict[str, bytes]]]:
        done = start
        for batch, _ in decoder.chunks(contents(start)):
            done += len(batch)
            yield (
                len(batch),
                {"images.bin": b"".join(batch), "lengths.bin": np.array([*map(len, batch)], "<i8").tobytes()},
            )
        if done != count:
            raise ValueError(f"count={count} images were announced, the source gave {done}")

    with claim_folder(folder) as partial_folder:
        if partial_folder is not None:
            require_space(folder, size + 16 * count + MARGIN - folder_size(partial_folder))
            announced = json.dumps((identity, resolution, count, meta, rules.options))
            hashes = append_resumably(partial_folder, {"images.bin": b"", "lengths.bin": b""}, announced, blocks)
            del hashes["lengths.bin"]
            lengths = np.fromfile(partial_folder / "lengths.bin", "<i8")
            offsets = np.concatenate([np.zeros(1, "<i8"), np.cumsum(lengths)])
            hashes["offsets.npy"] = write_npy(partial_folder / "offsets.npy", (count + 1,), offsets.dtype, [offsets])
            (partial_folder / "lengths.bin").unlink()
            shown = (hashes["images.bin"].whole, hashes["offsets.npy"].whole, meta["preprocessing"], resolution)
            if rules.changes:
                shown = (*shown, rules.changes)
            digests = {
                "sha256": sha256(json.dumps(shown).encode()).hexdigest(),
                "images_sha256": hashes["images.bin"].whole,
                "offsets_sha256": hashes["offsets.npy"].whole,
                "labels_sha256": None,
            }
            sizes = {"count": count, "channels": 3, "resolution": resolution}
            content = {
                "format": FORMAT,
                **meta,
                "rules": rules.options,
                **provenance(),
                **sizes,
                **digests,
                **block_hashes(hashes),
            }
            write_json(partial_folder / "meta.json", content, sort_keys=True)
            decoder.report(meta["name"])
    return EncodedImages(folder)


class EncodedImages:
    """A folder of encoded pictures, read as `packed_images.PackedImages` is, without labels.

    Opening compares the sizes of the files with meta.json, `verify` compares the content too.

    Attributes:
        hash: SHA-256 (hex) of the encoded bytes and of what is made of them.
        meta: The content of meta.json.

    Raises:
        FileNotFoundError: Nothing is packed there.
        OSError: Files are damaged or do not belong together.
    """

    labels = None

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._way_out = way_out(self.folder)
        self.meta = read_meta(self.folder)
        if "offsets_sha256" not in self.meta:
            raise OSError(f"{self.folder} holds pixels instead of encoded pictures: {self._way_out}")
        self.rules = DecodingRules(**self.meta.get("rules", {}))  # without: of an older version
        path, shape = self.folder / "offsets.npy", (self.meta["count"] + 1,)
        self._header = check_npy(path, shape, np.dtype("<i8"), self._way_out)
        self.offsets = np.load(path, mmap_mode="r")
        self._content: np.ndarray | None = None
        images = self.folder / "images.bin"
        size = images.stat().st_size if images.is_file() else None
        if size != self.offsets[-1]:
            found = "is missing" if size is None else f"is damaged, {size} bytes instead of {self.offsets[-1]}"
            raise OSError(f"{images} {found}: {self._way_out}")

    def __reduce__(self) -> tuple:
        return EncodedImages, (self.folder.absolute(),)

    def __len__(self) -> int:
        return self.meta["count"]

    @property
    def hash(self) -> str:
        return self.meta["sha256"]

    def verify(self, everything: bool = True) -> None:
        """Raise OSError where the bytes are not those that were packed; without `everything` compare some of them."""
        files = (("images.bin", 0, int(self.offsets[-1])), ("offsets.npy", self._header, 8 * len(self.offsets)))
        for name, start, size in files:
            digest = self.meta[f"{Path(name).stem}_sha256"]
            check_file(self.folder / name, start, size, digest, self.meta, everything)

    def encoded(self, index: int) -> bytes:
        """The content of a picture's file."""
        if self._content is None:
            self._content = np.memmap(self.folder / "images.bin", np.uint8, mode="r").view(np.ndarray)
        return self._content[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def fetch(self, indices: np.ndarray) -> tuple[Tensor, None]:
        """Images uint8 (B, C, H, W) in the order of `indices` (B,), and no labels; decoded by threads outside of workers."""
        check_indices(indices, len(self), self.folder)
        side = self.meta["resolution"]
        batch = np.empty((len(indices), 3, side, side), np.uint8)
        decode_row = partial(self._decode_row, batch, indices)
        if get_worker_info() is None and len(indices) > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(decode_row, range(len(indices))))
        else:
            for row in range(len(indices)):
                decode_row(row)
        return torch.from_numpy(batch), None

    def _decode_row(self, batch: np.ndarray, indices: np.ndarray, row: int) -> None:
        where = f"image {indices[row]} of {self.folder}"
        image = centre_crop(decode(self.encoded(indices[row]), where, self.rules).image, batch.shape[-1])
        batch[row] = np.asarray(image).transpose(2, 0, 1)

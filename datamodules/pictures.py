"""Encoded pictures to pixels: decoded, turned into RGB, cut and shrunk as EDM's dataset_tool does, by several threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from datamodules.loading import CORES

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_DEPTHS = ("I", "F")  # and what begins so: 16 or 32 bits, which Pillow would clip to 8

CENTRE_CROP = "the middle square, Pillow's Lanczos to the resolution, as EDM's dataset_tool --transform=center-crop"
THREADS = min(16, CORES)

Prepare = Callable[[Image.Image, str], Image.Image]
"""(RGB picture, its name for errors) -> RGB picture of the data set's resolution."""


def decode(content: bytes | memoryview, where: str) -> Image.Image:
    """The picture in its own mode. Errors: OSError that names `where` for what is damaged, or no picture."""
    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
        image.load()
    except UnidentifiedImageError:
        raise OSError(f"{where} is no picture or damaged; replace it or take it out") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{where} is damaged ({error}); replace it or take it out") from error
    return image


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Errors: ValueError for more than 8 bits per value."""
    if image.mode.startswith(_DEPTHS):
        raise ValueError(
            f"{where} has more than 8 bits per value (mode {image.mode}); convert it to RGB or take it out"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle, `side` x `side`; cut first, so that Lanczos sees no pixel outside of it."""
    width, height = image.size
    crop = min(width, height)
    box = ((width - crop) // 2, (height - crop) // 2, (width + crop) // 2, (height + crop) // 2)
    return image.crop(box).resize((side, side), Image.Resampling.LANCZOS)


class Decoder:
    """Pictures of one data set to pixels; counts those that were no RGB."""

    def __init__(self, prepare: Prepare):
        self.prepare = prepare
        self.seen = 0
        self.converted: list[str] = []

    def chunks(
        self, contents: Iterable[tuple[str, bytes]], size: int = 256
    ) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """The (name, content) pairs `size` at a time and in their order: their contents, and uint8 (n, 3, H, W)."""
        with ThreadPoolExecutor(THREADS) as pool:  # Pillow decodes and resizes without the interpreter's lock
            for batch in _batched(contents, size):
                pixels, modes = zip(*pool.map(self._pixels, batch), strict=True)
                self.seen += len(batch)
                self.converted += [
                    f"{name} ({mode})" for (name, _), mode in zip(batch, modes, strict=True) if mode != "RGB"
                ]
                yield [content for _, content in batch], np.stack(pixels)

    def _pixels(self, named: tuple[str, bytes]) -> tuple[np.ndarray, str]:
        where, content = named
        image = decode(content, where)
        return np.asarray(self.prepare(to_rgb(image, where), where)).transpose(2, 0, 1), image.mode

    def report(self, name: str) -> None:
        """One line on the pictures that were converted, if there were any."""
        if self.converted:
            first = self.converted[0]
            print(
                f"{name}: {len(self.converted):,} of {self.seen:,} pictures converted to RGB, the first {first}",
                flush=True,
            )


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

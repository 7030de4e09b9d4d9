"""From encoded pictures to pixels: decoded into RGB of 8 bits by one set of rules, then cut and shrunk, by several threads."""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from datamodules.components.batch_loader import CORES
from stillhouse.checkpoints.bounds import check_growth

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FACTOR = 256  # decoded bytes per byte of a file; a drawing on a plain background has some hundred
FLOOR = (
    1 << 27
)  # bytes that any picture may have decoded, a blank page of 33 megapixels too; several are decoded at once
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

CENTRE_CROP = "the middle square, Pillow's Lanczos to the resolution, as EDM's dataset_tool --transform=center-crop"
THREADS = min(16, CORES)

Preprocess = Callable[[Image.Image, str], Image.Image]
"""(RGB picture, its name for errors) -> picture of the data set's resolution, RGB or grey (L)."""


@dataclass(frozen=True)
class DecodingRules:
    """What becomes of pictures that are not plain RGB of 8 bits per channel.

    Args:
        depth: refuse: pictures of more bits are an error; round: their values are rounded to 8 bits.
        background: The colour behind transparent parts: a name in CSS, or red, green and blue from 0 to 255.
        max_aspect: The longest side allowed, in shortest sides; None: any.

    Raises:
        ValueError: Names the wrong option.
    """

    depth: str = "refuse"
    background: str | list[int] = "white"
    max_aspect: float | None = None

    def __post_init__(self):
        if self.depth not in ("refuse", "round"):
            raise ValueError(f"data.depth={self.depth!r} is unknown; choose one of refuse, round")
        self.colour  # noqa: B018, an unknown one is refused here
        number = isinstance(self.max_aspect, int | float) and not isinstance(self.max_aspect, bool)
        if self.max_aspect is not None and not (number and self.max_aspect >= 1):
            raise ValueError(f"data.max_aspect={self.max_aspect!r} must be a number of at least 1, or null for any")

    @property
    def colour(self) -> tuple[int, int, int]:
        try:
            colour = tuple(ImageColor.getrgb(self.background) if isinstance(self.background, str) else self.background)
        except (ValueError, TypeError):
            colour = ()
        if len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour):
            raise ValueError(
                f"data.background={self.background!r} is no colour; give a name such as white or black, or [RED,GREEN,BLUE] "
                "from 0 to 255"
            )
        return colour

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def changes(self) -> dict[str, Any]:
        """The options that decide pixels and differ from the defaults."""
        defaults = asdict(DecodingRules())
        return {key: value for key, value in self.options.items() if key != "max_aspect" and value != defaults[key]}


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: RGB of 8 bits per channel.
        mode: Pillow's name for what the file held.
        transparent: Whether anything was blended with the background.
        changes: What was changed or ignored, as the end of "3 pictures ...", to a detail of this picture.
    """

    image: Image.Image
    mode: str
    transparent: bool
    changes: dict[str, str]


def decode(
    content: bytes | memoryview,
    where: str,
    rules: DecodingRules,
    way_out: str | None = None,
    formats: tuple[str, ...] = _FORMATS,
) -> Picture:
    """Decode the first frame or page of a picture.

    Args:
        content: Of the file.
        where: What errors call it.
        rules: What becomes of pictures that are not plain RGB.
        way_out: What to do about a picture that is refused, for errors; by default what the rules offer.
        formats: Pillow's names of the formats that are accepted.

    Raises:
        OSError: The content is damaged, or no picture.
        ValueError: The rules refuse it.
    """
    changes, mend = {}, way_out or "replace it or take it out"
    try:
        image = Image.open(BytesIO(content), formats=formats)
        check_growth(4 * math.prod(image.size), len(content), "it", factor=FACTOR, floor=FLOOR)
        _check_aspect(image, where, rules)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            changes["hold several frames or pages, of which the first is used"] = f"{frames} of them"
        deep = _bits(image)
        if deep:
            _check_depth(image, deep, where, rules, way_out)
            changes["have more than 8 bits per channel and were rounded"] = f"{deep} bits"
            mode, image = image.mode, _rounded(image, content, formats)
        else:
            image.load()
            mode = image.mode
    except UnidentifiedImageError:
        raise OSError(f"{where} is no picture that Pillow can read, or damaged; {mend}") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged file can raise anything in a decoder
        raise OSError(f"{where} is damaged ({error}); {mend}") from error
    if _other_colours(image):
        changes["have a colour profile other than sRGB, which is ignored"] = image.mode
    if mode != "RGB":
        changes["converted to RGB"] = mode
    image, transparent = _flattened(image, where, rules)
    if transparent:
        changes[f"have transparent parts, blended onto {rules.background} (data.background)"] = mode
    return Picture(image, mode, transparent, changes)


class _Refused(Exception):
    """A picture that the rules refuse; an exception of its own, because decoders raise all others."""


def _check_aspect(image: Image.Image, where: str, rules: DecodingRules) -> None:
    short, long = sorted(image.size)
    if rules.max_aspect is not None and long > rules.max_aspect * short:
        raise _Refused(
            f"{where} has {image.width}x{image.height} pixels, too thin for its middle square to show it: "
            f"cut it, take it out, or raise data.max_aspect={rules.max_aspect:g}"
        )


# -- more than 8 bits per channel -------------------------------------------------------------------------------------

_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def _bits(image: Image.Image) -> int:
    """The bits per channel where they are more than 8, of which Pillow would drop or clip some; else 0."""
    bits = 0
    if image.format == "PNG":
        bits = 16 * any(";16" in str(tile.args) for tile in image.tile)
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (1,)))
    elif image.format == "PPM" and image.tile[0].codec_name.startswith("ppm"):
        args = image.tile[0].args
        bits = 0 if isinstance(args, str) else int(args[-1]).bit_length()  # of the largest value; text has one bit
    if image.mode.startswith(("I", "F")):
        bits = max(bits, 16 if image.mode.startswith("I;16") or image.format == "PPM" else 32)
    return bits if bits > 8 else 0


def _check_depth(image: Image.Image, bits: int, where: str, rules: DecodingRules, way_out: str | None) -> None:
    known = _is_grey(image) or image.format == "PPM" or all(_swapped(tile) for tile in image.tile)
    found = f"{where} has {bits} bits per channel instead of 8 (mode {image.mode})"
    if bits > 16 or image.mode == "F" or not known:
        raise _Refused(f"{found}, in a layout that can't be rounded here; {way_out or 'convert it or take it out'}")
    if rules.depth != "round":
        raise _Refused(f"{found}; {way_out or 'convert it, take it out, or set data.depth=round'}")


def _is_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") and all(str(_raw_mode(tile)).startswith("I;1") for tile in image.tile)


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _swapped(tile: Any) -> Any:
    """The tile with a decoder that gives the low byte of each value instead of the high one; None where there is none."""
    match = re.fullmatch(r"(RGB|RGBA|RGBX);16([BLN])", str(_raw_mode(tile)))
    if match:
        raw = f"{match[1]};16{_OTHER_ORDER[match[2]]}"
    elif _raw_mode(tile) == "LA;16B":
        raw = "RGBA"  # both bytes of both values
    else:
        return None
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


def _rounded(image: Image.Image, content: bytes | memoryview, formats: tuple[str, ...]) -> Image.Image:
    """The image with values v of `bits` bits as round(255 v / (2^bits - 1)); a transparent colour is compared in all bits."""
    if image.format == "PPM":
        image.load()  # Pillow scales by the largest value: colour to 255, rounded, grey to 65535
        if image.mode == "RGB":
            return image
        values, top = np.asarray(image), 65535
    elif _is_grey(image):
        top = 4095 if "I;12" in str(image.tile[0].args) else 65535
        values = np.asarray(image)
    else:
        raw, top = _raw_mode(image.tile[0]), 65535
        other = Image.open(BytesIO(content), formats=formats)
        other.tile = [_swapped(tile) for tile in other.tile]
        low = np.asarray(other).astype(np.uint32)
        values = low[..., ::2] * 256 + low[..., 1::2] if raw == "LA;16B" else np.asarray(image) * np.uint32(256) + low
    values = values.astype(np.uint32)
    if values.ndim == 2:
        values = values[..., None]
    eight = ((values * 255 + top // 2) // top).astype(np.uint8)
    key = image.info.get("transparency")
    if key is not None and values.shape[-1] in (1, 3):
        alpha = np.where((values == np.array(key)).all(-1, keepdims=True), 0, 255).astype(np.uint8)
        eight = np.concatenate([eight, alpha], -1)
    rounded = Image.fromarray(eight.squeeze(-1) if eight.shape[-1] == 1 else eight)
    rounded.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return rounded


# -- transparency -----------------------------------------------------------------------------------------------------


def _flattened(image: Image.Image, where: str, rules: DecodingRules) -> tuple[Image.Image, bool]:
    """The image as RGB, and whether anything was transparent; ValueError for a mode that Pillow can't convert."""
    try:
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB"), False
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        flat = image.convert("RGB")  # the colours as they are, also where nothing of them is to be seen
    except ValueError as error:
        raise ValueError(f"{where}: {error}; convert it to RGB or take it out") from error
    if alpha.getextrema()[0] == 255:
        return flat, False
    ground = Image.new("RGB", image.size, rules.colour)
    ground.paste(flat, mask=alpha)  # rounded to the nearest
    ground.info = image.info  # how the camera was held
    return ground, True


# -- colour profiles --------------------------------------------------------------------------------------------------

_TOLERANCE = 8  # levels of 255: Apple's grey of gamma 2.2 is near enough, Adobe RGB and Display P3 are not
_SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue in x and y


def _other_colours(image: Image.Image) -> bool:
    """Whether the file says that its values are in another colour space than sRGB's, or a grey as sRGB's."""
    if image.info.get("icc_profile"):
        return not _is_srgb(bytes(image.info["icc_profile"]))
    if image.format != "PNG" or "srgb" in image.info:
        return False
    gamma, points = image.info.get("gamma", 1 / 2.2), image.info.get("chromaticity", _SRGB)
    return abs(gamma - 1 / 2.2) > 0.02 or max(abs(a - b) for a, b in zip(points, _SRGB, strict=False)) > 0.01


@lru_cache(64)
def _is_srgb(profile: bytes) -> bool:
    """Whether values read as sRGB, as they are here, are the colours that the profile means."""
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[opened.profile.xcolor_space.strip()]
        levels = np.linspace(0, 255, 6).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(*[levels] * (1 if mode == "L" else len(mode))), -1)
        probe = Image.frombytes(mode, (cube[..., 0].size, 1), cube.tobytes())
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        meant = ImageCms.profileToProfile(probe, opened, ImageCms.createProfile("sRGB"), intent, "RGB")
    except (ImageCms.PyCMSError, ImportError, KeyError, OSError, ValueError, TypeError):  # damaged, or of another kind
        return False
    as_srgb, meant = (np.asarray(one).astype(int) for one in (probe.convert("RGB"), meant))
    return int(np.abs(as_srgb - meant).max()) <= _TOLERANCE


# -- many pictures ----------------------------------------------------------------------------------------------------


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle, `side` x `side` pixels; cut first, so that Lanczos reads no pixel outside of it."""
    width, height = image.size
    crop = min(width, height)
    box = ((width - crop) // 2, (height - crop) // 2, (width + crop) // 2, (height + crop) // 2)
    return image.crop(box).resize((side, side), Image.Resampling.LANCZOS)


class Decoder:
    """From the pictures of one data set to pixels; counts those that were no plain RGB, or smaller than the images.

    Args:
        preprocess: From a decoded picture to one of the data set's resolution.
        rules: What becomes of pictures that are not plain RGB.
    """

    def __init__(self, preprocess: Preprocess, rules: DecodingRules):
        self.preprocess = preprocess
        self.rules = rules
        self.seen = 0
        self.changed: dict[str, tuple[int, str]] = {}
        """What was changed, to the number of pictures and the first of them."""

    def chunks(
        self, contents: Iterable[tuple[str, bytes]], size: int = 256
    ) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Decode (name, content) pairs in their order, `size` at a time, into contents and pixels, uint8 (n, C, H, W)."""
        with ThreadPoolExecutor(THREADS) as pool:  # Pillow decodes and resizes without the interpreter's lock
            for batch in _batched(contents, size):
                pixels, changes = zip(*pool.map(self._pixels, batch), strict=True)
                self.seen += len(batch)
                for (where, _), changed in zip(batch, changes, strict=True):
                    for what, detail in changed.items():
                        count, first = self.changed.get(what, (0, f"{where} ({detail})"))
                        self.changed[what] = (count + 1, first)
                yield [content for _, content in batch], np.stack(pixels)

    def _pixels(self, named: tuple[str, bytes]) -> tuple[np.ndarray, dict[str, str]]:
        where, content = named
        picture = decode(content, where, self.rules)
        prepared, changes = self.preprocess(picture.image, where), picture.changes
        if prepared.mode == "L":
            changes.pop("converted to RGB", None)
            if picture.mode not in ("1", "L"):
                changes["converted to grey"] = picture.mode
        if min(picture.image.size) < min(prepared.size):
            changes[f"are smaller than {prepared.width} pixels and were enlarged"] = "{}x{}".format(*picture.image.size)
        return np.asarray(prepared).reshape(*prepared.size[::-1], -1).transpose(2, 0, 1), changes

    def report(self, name: str) -> None:
        """Print a line for each kind of picture that was no plain RGB, if there were any."""
        for what, (count, first) in self.changed.items():
            print(f"{name}: {count:,} of {self.seen:,} pictures {what}, the first {first}", flush=True)


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

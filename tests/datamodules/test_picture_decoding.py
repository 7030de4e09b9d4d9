"""Every kind of encoded picture becomes the RGB of 8 bits that it shows, or is refused by name."""

from io import BytesIO

import numpy as np
import pytest
from picture_files import encoded, pattern, png16, tiff16
from PIL import Image, ImageCms

from datamodules.components.picture_decoding import Decoder, DecodingRules, decode

DEEP = np.random.default_rng(0).integers(0, 65536, (6, 7, 4), dtype=np.uint16)
DEEP[0, 0] = (0x00FF, 0x0080, 0x0081, 0xFFFF)  # 0.99, 0.498 and 0.502 of a level of 8 bits


def netpbm(kind: bytes, values: np.ndarray, top: int = 65535) -> bytes:
    return b"%s %d %d %d\n" % (kind, values.shape[1], values.shape[0], top) + values.astype(">u2").tobytes()


def rounded(values: np.ndarray, top: int = 65535) -> np.ndarray:
    return np.floor(values / top * 255 + 0.5).astype(np.uint8)


def shown(content: bytes, **rules) -> np.ndarray:
    return np.asarray(decode(content, "a picture", DecodingRules(**rules)).image)


OPAQUE = np.dstack([DEEP[..., :3], np.full((6, 7), 65535, np.uint16)])
DEEP_FILES = {
    "png48": (png16(DEEP[..., :3]), DEEP[..., :3]),
    "png64": (png16(OPAQUE), DEEP[..., :3]),
    "png16": (png16(DEEP[..., :1]), DEEP[..., :1]),
    "png32, grey and opaque": (png16(OPAQUE[..., 2:]), OPAQUE[..., 2:3]),
    "tiff, little": (tiff16(DEEP[..., :3]), DEEP[..., :3]),
    "tiff, big": (tiff16(DEEP[..., :3], ">"), DEEP[..., :3]),
    "tiff, deflate": (tiff16(DEEP[..., :3], deflate=True), DEEP[..., :3]),
    "tiff, deflate, big": (tiff16(DEEP[..., :3], ">", deflate=True), DEEP[..., :3]),
    "tiff, alpha": (tiff16(OPAQUE), DEEP[..., :3]),
    "tiff, grey": (tiff16(DEEP[..., :1]), DEEP[..., :1]),
    "tiff, grey, big": (tiff16(DEEP[..., :1], ">"), DEEP[..., :1]),
    "ppm": (netpbm(b"P6", DEEP[..., :3]), DEEP[..., :3]),
    "pgm": (netpbm(b"P5", DEEP[..., :1]), DEEP[..., :1]),
}


@pytest.mark.parametrize("kind", DEEP_FILES)
def test_more_than_8_bits_are_refused_or_rounded(kind):
    content, values = DEEP_FILES[kind]
    with pytest.raises(ValueError, match="a picture has 16 bits per channel .*take it out, or set data.depth=round"):
        shown(content)
    picture = decode(content, "a picture", DecodingRules(depth="round"))
    assert np.array_equal(np.asarray(picture.image), np.broadcast_to(rounded(values), (6, 7, 3)))
    assert picture.changes["have more than 8 bits per channel and were rounded"] == "16 bits"


@pytest.mark.parametrize(
    "content",
    [
        encoded(DEEP[..., :1].astype(np.float32), "TIFF"),
        encoded(DEEP[..., :1].astype(np.int32), "TIFF"),
        tiff16(DEEP[..., :3], planar=True),  # which Pillow reads as 8 bits
    ],
    ids=["float", "int32", "planar"],
)
def test_what_has_no_known_range_is_refused_in_any_case(content):
    with pytest.raises(ValueError, match=r"a picture has \d+ bits .* layout that can't be rounded here; convert it or"):
        shown(content, depth="round")


def test_transparency_of_16_bits_is_compared_and_blended_in_all_bits():
    values, key = DEEP[..., :3].copy(), (0x1234, 0x5678, 0x9ABC)
    values[2, 2], values[3, 3] = key, (*key[:2], key[2] + 1)  # equal in 8 bits
    expected = rounded(values)
    expected[2, 2] = 255
    assert np.array_equal(shown(png16(values, key), depth="round"), expected)
    assert np.array_equal(shown(png16(DEEP[:1, :1]), depth="round", background="black")[0, 0], rounded(DEEP[0, 0, :3]))


SIDE = 24
Y, X = np.ogrid[:SIDE, :SIDE]
DISC = ((X - 12) ** 2 + (Y - 11) ** 2 < 81)[..., None]
HIDDEN = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)  # in no pixel the disc's


def disc(colour: tuple[int, int, int], ground: np.ndarray) -> np.ndarray:
    return np.where(DISC, np.array(colour, np.uint8), ground).astype(np.uint8)


def on_nothing(kind: str, colour=(200, 30, 60), channels: int = 3, **options) -> bytes:
    """A disc on transparent ground with random hidden colours."""
    pixels = np.concatenate([disc(colour, HIDDEN)[..., :channels], np.where(DISC, 255, 0).astype(np.uint8)], -1)
    return encoded(pixels, kind, mode="RGBA", **options)


def in_palette(kind: str) -> bytes:
    """Index 0 is red and transparent, 1 the disc's colour."""
    image = Image.fromarray(DISC[..., 0].astype(np.uint8), mode="P")
    image.putpalette([255, 0, 0, 200, 30, 60])
    content = BytesIO()
    image.save(content, kind, transparency=0)
    return content.getvalue()


KEY = (7, 8, 9)
TRANSPARENT = {
    "png": on_nothing("PNG"),
    "webp": on_nothing("WEBP", lossless=True, exact=True),
    "tiff": on_nothing("TIFF"),
    "grey": on_nothing("PNG", (200, 200, 200), channels=1),
    "palette": in_palette("PNG"),
    "gif": in_palette("GIF"),
    "one colour": encoded(disc((200, 30, 60), np.array(KEY)), transparency=KEY),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ([10, 20, 30], (10, 20, 30))]
)
def test_nothing_of_a_hidden_colour_is_left(kind, background, colour):
    ground = np.broadcast_to(np.array(colour, np.uint8), (SIDE, SIDE, 3))
    expected = disc((200, 200, 200) if kind == "grey" else (200, 30, 60), ground)
    picture = decode(TRANSPARENT[kind], "a picture", DecodingRules(background=background))
    assert np.array_equal(np.asarray(picture.image), expected)
    assert picture.transparent
    assert f"have transparent parts, blended onto {background} (data.background)" in picture.changes


def test_half_transparent_parts_are_blended_to_the_nearest():
    pixels = np.random.default_rng(2).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    alpha = pixels[..., 3:] / 255
    expected = np.floor(pixels[..., :3] * alpha + np.array([255, 0, 51]) * (1 - alpha) + 0.5)
    assert np.array_equal(shown(encoded(pixels, mode="RGBA"), background="#ff0033"), expected)


def test_an_alpha_without_anything_transparent_is_dropped():
    pixels = np.dstack([pattern(20, 20), np.full((20, 20), 255, np.uint8)])
    picture = decode(encoded(pixels, mode="RGBA"), "a picture", DecodingRules())
    assert np.array_equal(np.asarray(picture.image), pixels[..., :3])
    assert picture.changes == {"converted to RGB": "RGBA"}


def profile(**colorants: tuple[float, float, float]) -> bytes:
    """Pillow's sRGB with other colours (X, Y, Z) of red, green, blue: rXYZ, gXYZ, bXYZ."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(content[128:132], "big")):
        entry = 132 + 12 * i
        name, place = content[entry : entry + 4].decode(), int.from_bytes(content[entry + 4 : entry + 8], "big")
        for k, value in enumerate(colorants.get(name, ())):
            content[place + 8 + 4 * k : place + 12 + 4 * k] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(content)


ADOBE = {"rXYZ": (0.6097, 0.3111, 0.0195), "gXYZ": (0.2053, 0.6257, 0.0609), "bXYZ": (0.1492, 0.0632, 0.7446)}


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"icc_profile": profile()}, False),
        ({"icc_profile": profile(**ADOBE)}, True),
        ({"icc_profile": b"damaged"}, True),
        ({}, False),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_other_colour_spaces_are_said_and_ignored(kind, options, other):
    picture = decode(encoded(pattern(20, 20), kind, **options), "a picture", DecodingRules())
    assert ("have a colour profile other than sRGB, which is ignored" in picture.changes) == other
    assert np.array_equal(np.asarray(picture.image), shown(encoded(pattern(20, 20), kind)))


def frames(kind: str, **options) -> bytes:
    pictures = [Image.fromarray(pattern(20, 20, shift=i)) for i in range(3)]
    content = BytesIO()
    pictures[0].save(content, kind, save_all=True, append_images=pictures[1:], **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {})]
)
def test_of_several_frames_or_pages_the_first_is_taken_and_it_is_said(kind, options):
    content = frames(kind, **options)
    picture = decode(content, "a picture", DecodingRules())
    assert picture.changes["hold several frames or pages, of which the first is used"] == "3 of them"
    first = Image.open(BytesIO(content)).convert("RGB")
    assert np.array_equal(np.asarray(picture.image), np.asarray(first))


@pytest.mark.parametrize("size", [(3000, 1), (2, 21)])
def test_thin_pictures_are_refused(size):
    content = encoded(pattern(*size))
    with pytest.raises(ValueError, match=rf"a picture has {size[0]}x{size[1]} pixels, too thin .*data.max_aspect=10"):
        shown(content, max_aspect=10)
    assert shown(content).shape[:2] == size[::-1]


def test_each_kind_is_counted_and_its_first_named(capsys):
    contents = {"a.png": encoded(pattern(30, 30)), "b.png": TRANSPARENT["png"], "c.gif": frames("GIF")}
    decoder = Decoder(lambda image, where: image.resize((20, 20)), DecodingRules(background="black"))
    assert [pixels.shape for _, pixels in decoder.chunks([*contents.items(), ("d.png", TRANSPARENT["grey"])], 3)] == [
        (3, 3, 20, 20),
        (1, 3, 20, 20),
    ]
    decoder.report("toy")
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "toy: 1 of 4 pictures hold several frames or pages, of which the first is used, the first c.gif (3 of them)",
        "toy: 2 of 4 pictures have transparent parts, blended onto black (data.background), the first b.png (RGBA)",
        "toy: 3 of 4 pictures converted to RGB, the first b.png (RGBA)",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "cut"}, "data.depth='cut' is unknown; choose one of refuse, round"),
        ({"background": "whiet"}, "data.background='whiet' is no colour; give a name such as white"),
        ({"background": None}, "data.background=None is no colour"),
        ({"background": "#ff000080"}, "data.background='#ff000080' is no colour"),
        ({"background": [0, 0, 256]}, r"data.background=\[0, 0, 256\] is no colour; .* or \[RED,GREEN,BLUE\] from 0"),
        ({"background": 5}, "data.background=5 is no colour"),
        ({"max_aspect": 0.5}, "data.max_aspect=0.5 must be a number of at least 1, or null"),
        ({"max_aspect": True}, "data.max_aspect=True must be a number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingRules(**options)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_bytes_are_damaged_it_is_an_oserror_or_a_picture(kind, monkeypatch):
    """Pillow's decoders raise many kinds of exceptions."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    content, draw = encoded(pattern(20, 20), kind), np.random.default_rng(3)
    for _ in range(200):
        damaged = bytearray(content[: int(draw.integers(20, len(content) + 1))])
        damaged[int(draw.integers(min(len(damaged), 200)))] = int(draw.integers(256))
        try:
            decode(bytes(damaged), "a picture", DecodingRules())
        except (OSError, ValueError) as error:
            assert str(error).startswith("a picture ")  # noqa: PT017


def test_a_bitmap_in_text_has_one_bit():
    values = np.asarray(decode(b"P1\n3 2\n1 0 1\n0 1 0\n", "a picture", DecodingRules()).image)
    assert values[..., 0].tolist() == [[0, 255, 0], [255, 0, 255]]

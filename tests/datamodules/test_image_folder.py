import json
import zipfile
from io import BytesIO

import numpy as np
import pytest
from picture_files import encoded, folder_of, pattern, zip_of
from PIL import Image

from datamodules import ImageFolder
from launch.run.names import picture_set

FILES = {
    "cats/1.png": encoded(pattern(40, 30)),
    "cats/more/2.JPG": encoded(pattern(30, 50, shift=1)),
    "dogs/1.webp": encoded(pattern(24, 24, shift=2), "WEBP", lossless=True),
}


def module(folder, path="my_photos", name="my_photos16", **options):
    common = {"batch_size": 4, "resolution": 16, "num_classes": 0}
    return ImageFolder(name, str(folder / "data"), path=str(folder / path), **{**common, **options})


def test_any_pictures_with_or_without_classes(tmp_path):
    folder_of(tmp_path / "my_photos", FILES)
    zip_of(tmp_path / "my_photos.zip", {f"my_photos/{n}": c for n, c in FILES.items()} | {"__MACOSX/._1.png": b"none"})
    packed = module(tmp_path).reference()
    assert packed.labels is None
    centre = Image.fromarray(pattern(40, 30)[:, 5:35]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(packed.images[0].transpose(1, 2, 0), np.asarray(centre))
    for i, path in enumerate(("my_photos", "my_photos.zip")):
        classed = module(tmp_path, path, f"classed{i}", num_classes=2).reference()
        assert (classed.hash, classed.labels.tolist()) == (packed.hash, [0, 0, 1])
    with pytest.raises(ValueError, match=r"2 class folders with pictures \(cats, dogs\), data.num_classes=3"):
        module(tmp_path, name="other", num_classes=3).reference()


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_turned_upright(tmp_path, channels):
    upright = pattern(16, 16, channels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right-hand side
    folder_of(tmp_path / "my_photos", {"a.png": encoded(np.rot90(upright), exif=exif)})
    assert np.array_equal(
        module(tmp_path).reference().images[0], np.broadcast_to(upright.transpose(2, 0, 1), (3, 16, 16))
    )


def test_a_picture_whose_exif_data_are_damaged_is_named(tmp_path):
    content = encoded(pattern(16, 16, 1), "JPEG")
    exif = b"Exif\0\0garbagegarbage"
    marker = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    folder_of(tmp_path / "my_photos", {"a.jpg": content[:2] + marker + content[2:]})
    with pytest.raises(OSError, match=r"a.jpg has damaged EXIF data, .*not a TIFF file.*; remove them, or take"):
        module(tmp_path).reference()


def test_pictures_may_be_grey(tmp_path, capsys):
    """Colours by Pillow's luma, before they are shrunk; what is grey already stays as it is."""
    grey = pattern(16, 16, 1)
    folder_of(tmp_path / "my_photos", {"a.png": encoded(grey), "b.png": encoded(pattern(40, 30))})
    packed = module(tmp_path, channels=1).reference()
    assert np.array_equal(packed.images[0], grey.transpose(2, 0, 1))
    luma = Image.fromarray(pattern(40, 30)).convert("L").crop((5, 0, 35, 30))
    assert np.array_equal(packed.images[1, 0], np.asarray(luma.resize((16, 16), Image.Resampling.LANCZOS)))
    shown = capsys.readouterr().out
    assert "my_photos16: 1 of 2 pictures converted to grey, the first" in shown
    assert "b.png (RGB)" in shown
    assert picture_set("my_photos", 16, 1) != picture_set("my_photos", 16, 3)
    with pytest.raises(ValueError, match="data.channels=2: my_photos16 is packed with 3 or 1 channels"):
        module(tmp_path, channels=2)


def test_a_folder_that_has_changed_is_not_mistaken_for_what_was_packed(tmp_path):
    folder = folder_of(tmp_path / "my_photos", FILES)
    before = module(tmp_path).reference().hash
    assert module(tmp_path).reference().hash == before
    folder_of(folder, {"dogs/3.png": encoded(pattern(20, 20))})
    message = (
        r"my_photos has changed since .*my_photos16 was packed of it \(my_photos, 3 .* now other names\): delete the f"
    )
    with pytest.raises(ValueError, match=message) as caught:
        module(tmp_path).reference()
    assert "\n" not in str(caught.value)
    folder.rename(tmp_path / "elsewhere")
    assert module(tmp_path).reference().hash == before


def test_a_missing_folder_is_named(tmp_path):
    data = module(tmp_path)
    data.prepare_data()
    with pytest.raises(
        FileNotFoundError, match="no my_photos16 images: neither .* nor .*; set data.path to a folder or zip"
    ):
        data.check_source()


def test_the_name_keeps_two_folders_apart():
    assert picture_set("my_photos", 64) == "my_photos64"
    paths = ["a/my_photos", "b/my_photos", "/a/my_photos", "my_photos", "my photos", "my_photos.zip", ".", "..", "/"]
    names = [picture_set(path, 64) for path in paths]
    assert len(set(names)) == len(paths)
    assert all(name.replace("_", "").replace("-", "").isalnum() for name in names)
    assert picture_set("a/my_photos/", 64) == picture_set("a/my_photos", 64)


@pytest.mark.parametrize(("order", "classes"), [("text", [0, 2, 1]), ("natural", [0, 1, 2])])
def test_class_folders_are_numbered_as_asked_and_it_is_said(tmp_path, capsys, order, classes):
    folder_of(tmp_path / "my_photos", {f"{n}/a.png": encoded(pattern(16, 16, shift=n)) for n in (1, 2, 10)})
    data = module(tmp_path, num_classes=3, class_order=order)
    packed = data.reference()
    by_content = {image.tobytes(): label for image, label in zip(packed.images, packed.labels, strict=True)}
    assert [by_content[pattern(16, 16, shift=n).transpose(2, 0, 1).tobytes()] for n in (1, 2, 10)] == classes
    line = {
        "text": "classes by folder: 1 -> 0, 10 -> 1, 2 -> 2 (data.class_order=natural counts 1, 2, 10)",
        "natural": "classes by folder: 1 -> 0, 2 -> 1, 10 -> 2 (data.class_order=text counts 1, 10, 2)",
    }[order]
    assert f"my_photos16: {line}\n" in capsys.readouterr().out
    assert data.class_table() == line
    other = "natural" if order == "text" else "text"
    with pytest.raises(
        ValueError, match=f"data.class_order={other}, but .*my_photos16 was packed with {order}: delete"
    ):
        module(tmp_path, num_classes=3, class_order=other).reference()


def test_an_order_of_no_classes_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.class_order=natural has no effect without classes; set data.num_classes"
    ):
        module(tmp_path, class_order="natural")


def test_a_link_to_a_folder_around_it_is_passed_over(tmp_path, capsys):
    folder = folder_of(
        tmp_path / "my_photos", {f"c{i % 2}/{i}.png": encoded(pattern(16, 16, shift=i)) for i in range(6)}
    )
    folder_of(tmp_path / "elsewhere", {"deep/7.png": encoded(pattern(16, 16, shift=7))})
    (folder / "c1" / "loop").symlink_to(".")
    (folder / "c1" / "up").symlink_to("../..")
    (folder / "c1" / "outside").symlink_to(tmp_path / "elsewhere")
    (folder / "c0" / "again.png").symlink_to("0.png")
    packed = module(tmp_path, num_classes=2).reference()
    assert len(packed) == 8
    assert packed.labels.tolist() == [0] * 4 + [1] * 4
    shown = capsys.readouterr().out
    for link in ("loop", "up"):
        assert f"my_photos16: passed over {folder / 'c1' / link}, a link to a folder that it lies in\n" in shown
    (folder / "c2").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match="my_photos/c2 leads to nothing; repair or remove the link"):
        module(tmp_path, name="other").reference()


def bitmaps(seed: int) -> dict[str, bytes]:
    draw = np.random.default_rng(seed)
    return {f"{i}.bmp": encoded(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8), "BMP") for i in range(40)}


@pytest.mark.parametrize("write", [folder_of, zip_of])
def test_pictures_replaced_under_the_same_names_and_sizes_are_seen(tmp_path, write):
    write(tmp_path / "my_photos", bitmaps(0))
    module(tmp_path).reference()
    write(tmp_path / "my_photos", bitmaps(1))
    with pytest.raises(
        ValueError, match=r"has changed since .*my_photos16 .*40 pictures .*; now other pictures\): delete"
    ):
        module(tmp_path).check_source()
    write(tmp_path / "my_photos", bitmaps(0))
    assert np.array_equal(module(tmp_path).reference().images[1].transpose(1, 2, 0), decoded(bitmaps(0)["1.bmp"]))


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)))


def test_a_copy_with_other_times_is_read_once_and_then_known(tmp_path, capsys):
    folder_of(tmp_path / "my_photos", bitmaps(0))
    module(tmp_path).reference()
    folder_of(tmp_path / "copy", bitmaps(0))
    zip_of(tmp_path / "copy.zip", bitmaps(0))
    said = "sizes or times of files differ from when"
    for path in ("copy", "copy.zip"):
        capsys.readouterr()
        module(tmp_path, path).reference()
        assert said in capsys.readouterr().out
        module(tmp_path, path).reference()
        assert said not in capsys.readouterr().out


def test_what_an_older_version_packed_is_read_and_it_is_said(tmp_path, capsys):
    folder_of(tmp_path / "my_photos", FILES)
    path = module(tmp_path).reference().folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in meta.items() if k not in ("options", "source_stamp", "source_sha256")})
    )
    assert len(module(tmp_path).reference()) == 3
    assert "was packed by an older version, which did not record its source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "black"}, "data.background=black, but .*my_photos16 was packed with white: delete the folder"),
        ({"depth": "round"}, "data.depth=round, but .* was packed with refuse"),
        ({"class_order": "alphabet"}, "data.class_order='alphabet' is unknown; choose one of text, natural"),
    ],
)
def test_other_options_need_other_pixels(tmp_path, options, message):
    folder_of(tmp_path / "my_photos", FILES)
    module(tmp_path).reference()
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options).check_source()


def test_a_zip_that_holds_a_name_twice_is_refused(tmp_path):
    zip_of(tmp_path / "my_photos.zip", {"a.png": FILES["cats/1.png"]})
    with (
        zipfile.ZipFile(tmp_path / "my_photos.zip", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("a.png", FILES["dogs/1.webp"])
    with pytest.raises(ValueError, match=r"my_photos.zip holds a.png twice; make the zip again"):
        module(tmp_path, "my_photos.zip").reference()


def test_thin_pictures_are_refused_unless_allowed(tmp_path):
    folder_of(tmp_path / "my_photos", {"a.png": encoded(pattern(3000, 1))})
    with pytest.raises(ValueError, match=r"a.png has 3000x1 pixels, too thin .* data.max_aspect=10"):
        module(tmp_path).reference()
    assert len(module(tmp_path, max_aspect=None).reference()) == 1

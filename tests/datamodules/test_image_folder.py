import numpy as np
import pytest
from picture_files import encoded, folder_of, pattern, zip_of
from PIL import Image

from datamodules import ImageFolder
from launch.names import picture_set

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


def test_a_folder_that_has_changed_is_not_mistaken_for_what_was_packed(tmp_path):
    folder = folder_of(tmp_path / "my_photos", FILES)
    before = module(tmp_path).reference().hash
    assert module(tmp_path).reference().hash == before
    folder_of(folder, {"dogs/3.png": encoded(pattern(20, 20))})
    message = r"my_photos has changed since .*my_photos16 was packed of it \(my_photos, 3 pictures .*delete the folder"
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

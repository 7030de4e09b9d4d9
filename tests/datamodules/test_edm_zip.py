import json
import zipfile

import numpy as np
import pytest
from edm_files import edm_zip, png

from datamodules import EDMZip
from datamodules.trajectories import TrajectoryDataModule

IMAGES = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
LABELS = [i % 3 for i in range(37)]


def module(folder, path="a.zip", **options):
    common = {"batch_size": 4, "resolution": 8, "num_classes": 3}
    return EDMZip("toy", str(folder / "data"), path=str(folder / path), **{**common, **options})


def rewritten(path, changes):
    """The zip with some members replaced, added, or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | changes).items():
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize("compress_level", [0, 6])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_and_classes_are_those_of_the_zip(tmp_path, compress_level, compression):
    edm_zip(tmp_path / "a.zip", IMAGES, LABELS, compress_level, compression)
    packed = module(tmp_path).reference()
    packed.verify()
    assert np.array_equal(packed.images, IMAGES.transpose(0, 3, 1, 2))
    assert packed.labels.tolist() == LABELS
    assert packed.meta["source"] == "a.zip, 37 PNG files in the order of their names"
    assert (packed.meta["name"], packed.meta["classes"], packed.meta["preprocessing"]) == ("toy", 3, "none")


def test_the_order_is_that_of_the_names_in_any_folders(tmp_path):
    names = ["b/0.png", "a/deep/er/1.PNG", "2.png", "a/3.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
        archive.writestr("a/", "")
        archive.writestr("readme.txt", "no image")
        for name, pixels in zip(names, IMAGES, strict=False):
            archive.writestr(name, png(pixels))
    packed = module(tmp_path, num_classes=4).reference()
    order = [2, 3, 1, 0]  # 2.png, a/3.png, a/deep/er/1.PNG, b/0.png
    assert packed.labels.tolist() == order
    assert np.array_equal(packed.images, IMAGES[order].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("listing", ["classes", "null", "absent"])
def test_without_classes_the_listing_is_ignored(tmp_path, listing):
    edm_zip(tmp_path / "a.zip", IMAGES, LABELS if listing == "classes" else None)
    if listing == "absent":
        rewritten(tmp_path / "a.zip", {"dataset.json": None})
    data = module(tmp_path, num_classes=0)
    assert data.reference().labels is None
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert set(batch) == {"image", "position"}
    assert batch["image"].shape == (4, 3, 8, 8)


def test_packed_once_then_the_zip_may_go(tmp_path):
    path = edm_zip(tmp_path / "a.zip", IMAGES, LABELS)
    module(tmp_path).prepare_data()
    path.unlink()
    data = module(tmp_path)
    data.prepare_data()
    assert len(data.reference()) == 37


def test_without_the_zip_only_the_images_are_missing(tmp_path):
    data = module(tmp_path)
    assert (data.resolution, data.channels, data.num_classes) == (8, 3, 3)
    data.prepare_data()
    assert not list(tmp_path.iterdir())
    message = (
        r"no toy images: neither .*data/toy nor .*a.zip exists; make the zip with EDM's "
        r"`python dataset_tool.py --source=... --dest=.*a.zip` or set data.path"
    )
    for needed in (data.reference, data.train_dataloader, lambda: data.setup("fit")):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            needed()
        assert "\n" not in str(caught.value)


def test_trajectories_need_no_zip(tmp_path):
    from gaussian_teacher import GaussianTeacher

    teacher = GaussianTeacher(num_classes=3, resolution=8, channels=3)
    data = TrajectoryDataModule(
        teacher, root=str(tmp_path / "store"), pairs=8, held_out=8, batch_size=4, images=module(tmp_path)
    )
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"dataset_tool\.py"):
        data.reference()


NAME = "00001/img00000012.png"


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({NAME: png(IMAGES[0, :4])}, {}, ValueError, "has 8x4 pixels, data.resolution=8; make .* --resolution=8x8`"),
        ({NAME: png(IMAGES[0, :, :, 0])}, {}, ValueError, "is of mode L instead of RGB"),
        ({NAME: png(IMAGES[0])[:100]}, {}, OSError, "is damaged .*; copy or make the zip again"),
        ({NAME: b"text"}, {}, OSError, "is no picture that Pillow can read, or damaged; copy or make the zip again"),
        ({"x.png": png(IMAGES[0])}, {}, ValueError, "dataset.json gives x.png no class, data.num_classes=3"),
        ({}, {"num_classes": 2}, ValueError, "img00000002.png the class 2, data.num_classes=2; make .* correct it"),
        (
            {"dataset.json": '{"labels": null}'},
            {},
            ValueError,
            "has no classes in its dataset.json, data.num_classes=3",
        ),
        ({"dataset.json": None}, {}, ValueError, "has no classes in its dataset.json.* or set data.num_classes=0"),
        (
            {"dataset.json": json.dumps({"labels": [["a.png", 0], [NAME, 1], [NAME, 1], [NAME, 2]]})},
            {},
            ValueError,
            f"dataset.json gives {NAME} the class 1 and also 2; correct it or make it again",
        ),
        ({"dataset.json": '{"labels": [["00'}, {}, OSError, "dataset.json in .*a.zip is damaged"),
        ({"dataset.json": f'{{"labels": [["{NAME}", [0.5, 0.5]]]}}'}, {}, ValueError, "gives 00000/.* no class"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, change, options, error, message):
    edm_zip(tmp_path / "a.zip", IMAGES, LABELS)
    rewritten(tmp_path / "a.zip", change)
    with pytest.raises(error, match=message) as caught:
        module(tmp_path, **options).prepare_data()
    assert "a.zip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("how", ["short", "text", "empty", "bit"])
def test_a_damaged_zip_is_named(tmp_path, how):
    path = edm_zip(tmp_path / "a.zip", IMAGES, LABELS)
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # in the first image
    path.write_bytes({"short": content[:-500], "text": b"hello", "empty": b"", "bit": content}[how])
    with pytest.raises(OSError, match=r"a.zip is damaged .*; copy or make (it|the zip) again") as caught:
        module(tmp_path).prepare_data()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("*"))


def test_a_zip_without_images_and_grey_data_are_refused(tmp_path):
    edm_zip(tmp_path / "a.zip", IMAGES[:0], [])
    with pytest.raises(ValueError, match=r"a.zip holds no PNG images; make it with EDM's dataset_tool.py"):
        module(tmp_path).reference()
    with pytest.raises(ValueError, match=r"data.channels=1: toy is packed with 3 channels; set data.channels=3"):
        module(tmp_path, channels=1)


def test_a_zip_replaced_by_another_is_seen(tmp_path):
    edm_zip(tmp_path / "a.zip", IMAGES, LABELS)
    module(tmp_path).reference()
    edm_zip(tmp_path / "a.zip", IMAGES, LABELS)
    module(tmp_path).check_source()
    for images, labels, what in ((IMAGES[::-1], LABELS, "pictures"), (IMAGES, LABELS[::-1], "classes")):
        edm_zip(tmp_path / "a.zip", images, labels)
        with pytest.raises(
            ValueError, match=rf"a.zip has changed since .*toy was packed .*; now other {what}\): delete"
        ):
            module(tmp_path).check_source()

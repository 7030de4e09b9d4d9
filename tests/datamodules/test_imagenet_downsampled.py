import pickle
import zipfile
from io import BytesIO

import numpy as np
import pytest
from picture_files import folder_of, zip_of

from datamodules import DownsampledImageNet

IMAGES = np.random.default_rng(0).integers(0, 256, (13, 3, 8, 8), dtype=np.uint8)
LABELS = [1, 2, 3, 3, 2, 1, 1, 1, 2, 3, 3, 1, 2]  # by map_clsloc.txt
SORTED = {1: 2, 2: 0, 3: 1}
MAPPING = b"n02119789 1 kit_fox\nn01440764 2 tench\nn01443537 3 goldfish\n"
PARTS = [slice(0, 5), slice(5, 9), slice(9, 13)]


def npz(part: slice, **changes) -> bytes:
    content = BytesIO()
    rows = IMAGES[part].reshape(-1, 192)
    np.savez(content, **{"data": rows, "labels": np.array(LABELS[part]), "mean": rows.mean(0), **changes})
    return content.getvalue()


def pickled(part: slice) -> bytes:
    return pickle.dumps(
        {"data": IMAGES[part].reshape(-1, 192), "labels": LABELS[part], "mean": IMAGES[0].ravel() / 255}
    )


NPZ = {f"train_data_batch_{i}.npz": npz(part) for i, part in enumerate(PARTS, 1)}
MAP = {"map_clsloc.txt": MAPPING}


def module(folder, path="a", name="toy", **options):
    common = {"batch_size": 4, "resolution": 8, "num_classes": 3}
    return DownsampledImageNet(name, str(folder / "data"), path=str(folder / path), **{**common, **options})


def test_zips_npz_and_pickles_are_the_same_images_with_sorted_classes(tmp_path):
    folder_of(tmp_path / "npz", NPZ | MAP)
    folder_of(tmp_path / "pickles", {f"train_data_batch_{i}": pickled(part) for i, part in enumerate(PARTS, 1)} | MAP)
    for number, names in ((1, [1, 2]), (2, [3])):
        folder_of(tmp_path / "zips", MAP)
        files = {f"Imagenet64/train_data_batch_{i}.npz": npz(PARTS[i - 1]) for i in names}
        zip_of(tmp_path / "zips" / f"Imagenet64_train_part{number}_npz.zip", files, zipfile.ZIP_DEFLATED)
    for path in ("npz", "pickles", "zips"):
        packed = module(tmp_path, path, path).reference()
        packed.verify()
        assert np.array_equal(packed.images, IMAGES)
        assert packed.labels.tolist() == [SORTED[label] for label in LABELS]
    from_middle = np.concatenate(list(module(tmp_path, "zips").source().chunks(7)))
    assert np.array_equal(from_middle, IMAGES[7:])


def test_batch_ten_follows_nine(tmp_path):
    parts = [slice(i, i + 1) for i in range(10)]
    folder_of(tmp_path / "a", {f"train_data_batch_{i}.npz": npz(part) for i, part in enumerate(parts, 1)})
    packed = module(tmp_path, num_classes=0).reference()
    assert np.array_equal(packed.images, IMAGES[:10])
    assert packed.labels is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"map_clsloc.txt": None},
            FileNotFoundError,
            "clsloc.txt is missing, .* or set data.num_classes=0 data.conditional",
        ),
        ({"map_clsloc.txt": MAPPING[:25]}, OSError, "map_clsloc.txt does not number 3 classes from 1 on; get it again"),
        ({"train_data_batch_2.npz": None}, FileNotFoundError, "a has the batches 1, 3; get all files"),
        (dict.fromkeys(NPZ), FileNotFoundError, "a has the batches none; get all files"),
        ({"train_data_batch_2.npz": npz(PARTS[1])[:700]}, OSError, "batch_2.npz is damaged or cut short"),
        ({"train_data_batch_2.npz": b"text"}, OSError, "batch_2.npz is damaged or cut short"),
        (
            {"train_data_batch_2.npz": npz(PARTS[1], labels=np.array([0, 1, 2, 3]))},
            ValueError,
            "labels 0 to 3 instead of 1",
        ),
        (
            {"train_data_batch_2.npz": npz(PARTS[1], data=IMAGES[5:9])},
            ValueError,
            r"rows of \(3, 8, 8\) instead of uint8",
        ),
        ({"train_data_batch_2.npz": npz(PARTS[1], labels=np.array([print] * 4))}, OSError, "of an unknown layout"),
        (
            {"train_data_batch_2.npz": None, "train_data_batch_2": b"\x80\x02cos\nsystem\n."},
            OSError,
            "it asks for os.system",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, changes, error, message):
    folder_of(tmp_path / "a", {name: content for name, content in (NPZ | MAP | changes).items() if content is not None})
    with pytest.raises(error, match=message) as caught:
        module(tmp_path).prepare_data()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("*"))


def test_another_resolution_or_a_file_is_refused(tmp_path):
    folder_of(tmp_path / "a", NPZ | MAP)
    with pytest.raises(ValueError, match=r"rows of \(192,\) instead of uint8 \(3072,\); correct data.resolution"):
        module(tmp_path, resolution=32).prepare_data()
    with pytest.raises(FileNotFoundError, match="batch_1.npz is no folder; set data.path to the folder with"):
        module(tmp_path, "a/train_data_batch_1.npz").prepare_data()


@pytest.mark.parametrize("kind", ["npz", "pickle", "zip"])
def test_a_batch_replaced_by_another_is_seen(tmp_path, capsys, kind):
    def write(parts):
        files = {f"train_data_batch_{i}.npz": npz(part) for i, part in enumerate(parts, 1)}
        if kind == "pickle":
            files = {f"train_data_batch_{i}": pickled(part) for i, part in enumerate(parts, 1)}
        folder_of(tmp_path / "a", MAP if kind == "zip" else files)
        if kind == "zip":
            zip_of(tmp_path / "a" / "train.zip", files)

    write(PARTS[1:])
    module(tmp_path, num_classes=0).reference()
    folder_of(tmp_path / "a" / "runs", {"metrics.csv": b"of training, in the same folder"})
    module(tmp_path, num_classes=0).check_source()
    assert "comparing" not in capsys.readouterr().out
    write(PARTS[1:])
    module(tmp_path, num_classes=0).check_source()
    write(PARTS[:0:-1])
    with pytest.raises(ValueError, match=r"a has changed since .*toy was packed .*; now other batches\): delete"):
        module(tmp_path, num_classes=0).check_source()

"""Fashion-MNIST's IDX files: pixels and labels exactly, both splits, and what is wrong with a file in one line."""

import gzip
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from published_files import idx

from datamodules import FashionMNIST
from datamodules.fashion_mnist import read_idx
from stillhouse.checkpoints.weights import PROJECT_ROOT

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
RANDOM = np.random.default_rng(0)
IMAGES, TEST = (RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8) for count in (30, 12))
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
ARRAYS = (IMAGES, np.arange(30, dtype=np.uint8) % 10, TEST, np.arange(12, dtype=np.uint8) % 10)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    for name, array in zip(NAMES, ARRAYS, strict=True):
        (tmp_path / f"files/{name}.gz").write_bytes(idx(array))
    return tmp_path / "files"


def fashion(folder, resolution=32, **options):
    common = {"path": str(folder), "batch_size": 4, "resolution": resolution, "num_classes": 10}
    return FashionMNIST(f"fashion{resolution}", str(folder.parent / "packed"), **{**common, **options})


def test_every_resolution_and_both_parts(folder):
    wide = np.zeros((30, 32, 32))
    wide[:, 2:30, 2:30] = IMAGES
    means = np.floor(wide.reshape(30, 16, 2, 16, 2).mean((2, 4)) + 0.5)
    for resolution, pixels in ((28, IMAGES), (32, wide), (16, means)):
        data = fashion(folder, resolution)
        packed, held_out = data.reference(), data.held_out()
        assert np.array_equal(packed.images[:, 0], pixels)
        assert packed.labels.tolist() == ARRAYS[1].tolist()
        assert (len(held_out), held_out.shape[1:]) == (12, packed.shape[1:])
        assert held_out.labels.tolist() == ARRAYS[3].tolist()
        assert held_out.folder == data.folder / "test"
    assert np.array_equal(fashion(folder, 28).held_out().images[:, 0], TEST)


def test_unpacked_files_do_as_well_and_changed_ones_are_noticed_in_both_parts(folder):
    fashion(folder, 28).reference()
    for name in NAMES:
        (folder / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
        (folder / f"{name}.gz").unlink()
    fashion(folder, 28).check_source()  # the same content
    (folder / NAMES[2]).write_bytes(gzip.decompress(idx(255 - TEST)))
    with pytest.raises(ValueError, match=r"files has changed since .*fashion28/test was packed of it .*other images"):
        fashion(folder, 28).check_source()
    (folder / NAMES[3]).unlink()
    assert len(fashion(folder, 28).held_out()) == 12  # with a part of its source there is nothing to compare


def test_each_file_that_is_missing_is_read_from_a_copy_where_the_published_ones_are_asked_for(
    folder, tmp_path, monkeypatch
):
    content = {name: sha256(gzip.decompress((folder / f"{name}.gz").read_bytes())).hexdigest() for name in NAMES}
    monkeypatch.setattr("datamodules.fashion_mnist._CONTENT", content)
    debian = folder.rename(tmp_path / "debian")
    copied = {"packaged": str(debian), "url": "http://a/b/"}
    folder.mkdir()
    shutil.copy(debian / f"{NAMES[1]}.gz", folder)
    missing = (
        f"no fashion28 images: neither .*fashion28 nor {folder}/{NAMES[0]}.gz exists; put the file there, .*data.path$"
    )
    with pytest.raises(FileNotFoundError, match=missing):
        fashion(folder, 28, **copied).reference()
    both = fashion(folder, 28, files={}, num_classes=0, **copied)
    assert np.array_equal(both.reference().images[:, 0], IMAGES)
    assert both.reference().labels is None
    assert len(both.held_out()) == 12
    (folder / f"{NAMES[2]}.gz").write_bytes(idx(255 - TEST))
    with pytest.raises(OSError, match="t10k-images-idx3-ubyte.gz is another file than the published"):
        fashion(folder, 16, files={}, **copied).held_out()
    (debian / f"{NAMES[3]}.gz").unlink()
    ways = (
        rf"add download=true to fetch http://a/b/{NAMES[3]}.gz, install Debian's package dataset-fashion-mnist, or put"
    )
    with pytest.raises(
        FileNotFoundError, match=f"no test images: .*fashion32/test nor {folder}/{NAMES[3]}.gz exists; {ways}"
    ):
        fashion(folder, 32, files={}, **copied).check_source()
    assert not (tmp_path / "packed/fashion32").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (NAMES[0], idx(IMAGES)[:-200], r"train-images-idx3-ubyte.gz is damaged \(.*end.*\); get it again"),
        (NAMES[0], gzip.compress(b"\0\0\x0d\x03" + bytes(9)), "begins with 00 00 0d 03, not as an IDX file of bytes"),
        (NAMES[0], gzip.compress(b""), "begins with nothing"),
        (NAMES[0], b"no gzip", r"is damaged \(Not a gzipped file"),
        (NAMES[0], gzip.compress(gzip.decompress(idx(IMAGES)) + b"1"), "announces 30x28x28 values and holds more"),
        (NAMES[0], gzip.compress(gzip.decompress(idx(IMAGES))[:-1]), "announces 30x28x28 values and holds 23519"),
        (NAMES[0], gzip.compress(b"\0\0\x08\x03" + b"\x7f" * 12), "damaged"),
        (
            NAMES[1],
            idx(ARRAYS[1][:29]),
            "holds 30x28x28 values and train-labels-idx1-ubyte 29, instead of .*28x28 and a class",
        ),
        (NAMES[0], idx(IMAGES[:, :27]), "holds 30x27x28 values"),
    ],
    ids=[
        "cut short",
        "another type",
        "empty",
        "no gzip",
        "more values",
        "fewer values",
        "more than fits",
        "fewer labels",
        "other shape",
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(folder, name, content, message):
    (folder / f"{name}.gz").write_bytes(content)
    with pytest.raises(OSError, match=message) as error:
        fashion(folder).reference()
    assert "\n" not in str(error.value)


def test_other_content_options_and_missing_files_are_refused(folder):
    with pytest.raises(OSError, match=r"other file than the published train-images.*data\.files=null"):
        fashion(folder, files={}).reference()
    published = dict(OmegaConf.load(PROJECT_ROOT / "conf/data/fashion_mnist.yaml").files)
    assert fashion(folder, files=published).published
    with pytest.raises(ValueError, match=f"data.files: {NAMES[3]}.gz has another SHA-256 .* or set data.files=null"):
        fashion(folder, files=published | {f"{NAMES[3]}.gz": "0" * 64})
    with pytest.raises(ValueError, match="data.resolution=64, data.num_classes=10: .* 16, 28, 32 pixels a side"):
        fashion(folder, 64)
    with pytest.raises(ValueError, match="data.part must be one of training, test, got 'train'"):
        fashion(folder, part="train")
    assert fashion(folder, 16, part="test").held_out() is None
    fashion(folder).reference()
    with pytest.raises(ValueError, match=r"fashion32 was packed with data\.files=null, of any files .*or data\.name"):
        fashion(folder, files={}).check_source()
    (folder / f"{NAMES[1]}.gz").unlink()
    fashion(folder, 16).prepare_data()  # for a method that needs no images
    with pytest.raises(
        FileNotFoundError, match="no fashion16 images: neither .*train-labels-idx1-ubyte.gz exists; put"
    ):
        fashion(folder, 16).reference()


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_files_are_the_published_ones_and_read_as_torchvision_reads_them(tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    for name in NAMES:
        unpacked = tmp_path / name
        unpacked.write_bytes(gzip.decompress((DEBIAN / f"{name}.gz").read_bytes()))
        values, _ = read_idx(DEBIAN / f"{name}.gz")
        theirs = (read_image_file if "images" in name else read_label_file)(str(unpacked))
        assert np.array_equal(values, theirs.numpy())
    data = FashionMNIST("f", str(tmp_path), path=str(DEBIAN), files={}, batch_size=4, resolution=16, num_classes=10)
    assert len(data.reference()) == 60000
    assert len(data.held_out()) == 10000

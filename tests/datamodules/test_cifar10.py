import io
import pickle
import struct
import tarfile
from hashlib import sha256

import numpy as np
import pytest
from edm_files import edm_zip

from datamodules import CIFAR10

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
PER_BATCH = 4
IMAGES = np.random.default_rng(0).integers(0, 256, (5 * PER_BATCH, 3, 32, 32), dtype=np.uint8)
LABELS = [3 * i % 10 for i in range(5 * PER_BATCH)]


def python2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2's numpy wrote into CIFAR-10's batches, protocol 2: text is of the kind without encoding."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = b"(" + b"".join(map(number, images.shape)) + b"t"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    pairs = text(b"batch_label") + text(b"training batch") + text(b"labels") + listed + text(b"data") + array
    return b"\x80\x02}(" + pairs + b"u."


def batches(images=IMAGES, labels=LABELS) -> dict[str, bytes]:
    rows = images.reshape(len(images), -1)
    parts = [slice(i * PER_BATCH, (i + 1) * PER_BATCH) for i in range(5)]
    files = {f"data_batch_{i}": python2_pickle(rows[p], labels[p]) for i, p in enumerate(parts, 1)}
    return {"batches.meta": pickle.dumps({"label_names": []}), **files, "readme.html": b"<html>", "test_batch": b"no"}


def write_tar(path, files=None):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (files or batches()).items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path, files=None):
    path.mkdir(parents=True)
    for name, content in (files or batches()).items():
        (path / name).write_bytes(content)
    return path


def module(folder, path, name="cifar10", **options):
    common = {"batch_size": 4, "resolution": 32, "num_classes": 10, "url": URL}
    return CIFAR10(name, str(folder / "data"), path=str(path), **{**common, **options})


def test_archive_folder_and_zip_are_the_same_images(tmp_path):
    write_folder(tmp_path / "torchvision" / "cifar-10-batches-py")
    sources = {
        "tar": write_tar(tmp_path / "cifar-10-python.tar.gz"),
        "folder": tmp_path / "torchvision" / "cifar-10-batches-py",
        "around": tmp_path / "torchvision",
        "edm": edm_zip(tmp_path / "a.zip", IMAGES.transpose(0, 2, 3, 1), LABELS),
    }
    for name, path in sources.items():
        packed = module(tmp_path, path, name).reference()
        packed.verify()
        assert np.array_equal(packed.images, IMAGES)
        assert packed.labels.tolist() == LABELS
        assert packed.hash == sha256(IMAGES.tobytes()).hexdigest()


def test_the_checksum_is_that_of_the_archive(tmp_path):
    path = write_tar(tmp_path / "cifar-10-python.tar.gz")
    right = sha256(path.read_bytes()).hexdigest()
    message = (
        f"gz is cut short or another file, its SHA-256 is {right[:16]}... instead of 0000000000000000...; delete it"
    )
    with pytest.raises(OSError, match=f"{message} and add download=true to fetch {URL}") as caught:
        module(tmp_path, path, sha256="0" * 64).prepare_data()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
    assert len(module(tmp_path, path, sha256=right.upper()).reference()) == len(IMAGES)
    folder = write_folder(tmp_path / "cifar-10-batches-py")
    assert len(module(tmp_path, folder, "folder", sha256=right).reference()) == len(IMAGES)


def test_without_images_the_numbers_are_there_and_the_address_is_named(tmp_path):
    data = module(tmp_path, tmp_path / "none.tar.gz", conditional=False)
    assert (data.resolution, data.channels, data.num_classes) == (32, 3, 0)
    data.prepare_data()
    message = f"neither .*cifar10 nor .*none.tar.gz exists; add download=true to fetch {URL}, or put the file there"
    with pytest.raises(FileNotFoundError, match=message):
        data.check_source()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data_batch_3": pickle.dumps({"data": Evil()}, 2)},
            r"asks for __builtin__.print, which data of this kind never",
        ),
        ({"data_batch_3": batches()["data_batch_3"][:5000]}, "data_batch_3 in .* is damaged or no such data"),
        ({"data_batch_3": b""}, "data_batch_3 in .* is damaged or no such data"),
        ({"data_batch_3": None}, "data_batch_3"),
        ({"data_batch_3": pickle.dumps({"data": IMAGES[:4].reshape(4, -1)})}, "is not one of CIFAR-10's batches"),
        ({"data_batch_3": pickle.dumps({"data": IMAGES[:4], "labels": [1] * 4})}, "is not one of CIFAR-10's batches"),
        (
            {"data_batch_3": pickle.dumps({"data": IMAGES[:4], "labels": [[1], [1, 2]]})},
            "is not one of CIFAR-10's batches",
        ),
    ],
)
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_what_is_no_batch_is_named_and_never_executed(tmp_path, capsys, write, changes, message):
    files = {name: content for name, content in (batches() | changes).items() if content is not None}
    with pytest.raises(OSError, match=message) as caught:
        module(tmp_path, write(tmp_path / "source", files)).prepare_data()
    assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [slice(0, 20_000), slice(0, 0), slice(9, None)])
def test_a_cut_archive(tmp_path, content):
    path = write_tar(tmp_path / "a.tar.gz")
    path.write_bytes(path.read_bytes()[content])
    with pytest.raises(OSError, match=r"a.tar.gz is damaged or cut short .*; delete it and get it again"):
        module(tmp_path, path).prepare_data()


def test_options_that_are_not_cifar10s(tmp_path):
    with pytest.raises(ValueError, match="data.resolution=64, data.num_classes=10: CIFAR-10 has 32 pixels a side"):
        module(tmp_path, write_folder(tmp_path / "a"), resolution=64).prepare_data()


def test_an_archive_replaced_by_another_is_seen_and_a_copy_is_not(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar.gz")
    module(tmp_path, path).reference()
    write_tar(path, batches(IMAGES[::-1]))
    with pytest.raises(
        ValueError, match=r"a.tar.gz has changed since .*cifar10 was packed .*; now other images\): delete"
    ):
        module(tmp_path, path).check_source()
    write_tar(path, batches(IMAGES, LABELS[::-1]))
    with pytest.raises(ValueError, match=r"; now other classes\): delete"):
        module(tmp_path, path).check_source()
    folder = write_folder(tmp_path / "cifar-10-batches-py")
    module(tmp_path, folder).check_source()
    edm = edm_zip(tmp_path / "a.zip", IMAGES.transpose(0, 2, 3, 1), LABELS)
    with pytest.raises(
        ValueError, match=r"a.zip is of another kind than what .*cifar10 was packed of .*data.path back"
    ):
        module(tmp_path, edm).check_source()


def test_of_torchvisions_root_the_batches_alone_are_looked_at(tmp_path, capsys):
    write_folder(tmp_path / "all/cifar-10-batches-py")
    module(tmp_path, tmp_path / "all").reference()
    (tmp_path / "all/link").symlink_to("nowhere")
    (tmp_path / "all/other").write_text("another data set")
    capsys.readouterr()
    module(tmp_path, tmp_path / "all").check_source()
    assert "comparing" not in capsys.readouterr().out

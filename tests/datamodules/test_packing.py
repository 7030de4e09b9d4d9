import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.packing import PackedImages, pack
from datamodules.storage import check_npy, write_npy

FORK = multiprocessing.get_context("fork")
META = {"name": "toy", "classes": 3, "source": "numpy", "preprocessing": "none"}
COUNT, SHAPE = 50, (2, 4, 4)
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
LABELS = np.arange(COUNT) % 3


def pack_toy(folder: Path, images=IMAGES, **changes) -> PackedImages:
    return pack(folder, images, **{"count": COUNT, "shape": SHAPE, "labels": LABELS, "meta": META, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pack_toy(tmp_path / "toy")
    return tmp_path / "toy"


def test_round_trip_from_chunks(tmp_path):
    packed = pack_toy(tmp_path / "toy", (IMAGES[i : i + 7] for i in range(0, COUNT, 7)))
    assert np.array_equal(packed.images, IMAGES)
    assert np.array_equal(np.load(tmp_path / "toy" / "images.npy"), IMAGES)
    assert np.array_equal(packed.labels, LABELS)
    assert packed.labels.dtype == np.int64
    assert len(packed) == COUNT
    assert packed.meta["resolution"] == 4
    assert packed.meta["channels"] == 2
    assert packed.hash == pack_toy(tmp_path / "again").hash
    packed.verify()


def test_fetch_keeps_the_asked_order_and_owns_its_memory(folder):
    packed = PackedImages(folder)
    indices = np.array([49, 3, 3, 0, 17])
    images, labels = packed.fetch(indices)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert np.array_equal(images.numpy(), IMAGES[indices])
    assert labels.tolist() == LABELS[indices].tolist()
    images.zero_()  # the file is mapped read-only: this must not touch it
    assert np.array_equal(packed.fetch(indices)[0].numpy(), IMAGES[indices])
    for wrong in ([50], [-1]):
        with pytest.raises(IndexError, match="exceed the 50 images"):
            packed.fetch(np.array(wrong))


def test_without_labels(tmp_path):
    packed = pack_toy(tmp_path / "toy", labels=None, meta={**META, "classes": 0})
    assert packed.labels is None
    assert packed.fetch(np.arange(3))[1] is None
    assert not (tmp_path / "toy" / "labels.npy").exists()


def test_a_pickle_is_a_path_and_a_fork_reads_on(folder):
    packed = PackedImages(folder)
    packed.fetch(np.arange(4))
    data = pickle.dumps(packed)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).images, IMAGES)

    queue = FORK.SimpleQueue()
    child = FORK.Process(target=lambda: queue.put(packed.fetch(np.arange(9))[0].numpy().tobytes()))
    child.start()
    assert queue.get() == IMAGES[:9].tobytes()
    child.join()


def test_killed_in_the_middle_leaves_nothing_under_the_final_name(tmp_path):
    reached = FORK.Event()

    def chunks():
        yield IMAGES[:30]
        reached.set()
        signal.pause()

    child = FORK.Process(target=lambda: pack_toy(tmp_path / "toy", chunks()))
    child.start()
    assert reached.wait(20)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(f"toy.tmp-{child.pid}-")
    other = tmp_path / f"other.tmp-{child.pid}-{leftover.name[-8:]}"  # of a data set that is not ours to clean
    other.mkdir()

    pack_toy(tmp_path / "toy").verify()
    assert {path.name for path in tmp_path.iterdir()} == {"toy", other.name}


def test_of_two_packers_the_first_wins(tmp_path):
    both = FORK.Barrier(2)

    def chunks():
        yield IMAGES
        both.wait(20)

    children = [FORK.Process(target=lambda: pack_toy(tmp_path / "toy", chunks())) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    PackedImages(tmp_path / "toy").verify()


def test_an_existing_folder_stays(folder):
    before = (folder / "images.npy").stat().st_ino
    assert pack_toy(folder, 255 - IMAGES).images[0, 0, 0, 0] == IMAGES[0, 0, 0, 0]
    assert (folder / "images.npy").stat().st_ino == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, r"images must be uint8 \(n, 2, 4, 4\), got float32"),
        ({"images": IMAGES[:, :1]}, r"images must be uint8 \(n, 2, 4, 4\), got uint8 \(50, 1, 4, 4\)"),
        ({"images": IMAGES[:20]}, "count=50 images were announced, the source gave 20"),
        ({"images": [IMAGES, IMAGES]}, "count=50 images were announced, the source gave more"),
        ({"shape": (2, 4, 8)}, "images must be square"),
        ({"labels": None}, "classes=3 need labels"),
        ({"labels": LABELS + 1}, r"labels must be in \[0, 3\), got 1 to 3"),
        ({"labels": LABELS[:4]}, r"labels must be integers of shape \(50,\), got int64 \(4,\)"),
        ({"meta": {"name": "toy"}}, "meta must say classes, name, preprocessing, source, got name"),
    ],
)
def test_wrong_source_is_refused_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pack_toy(tmp_path / "toy", **changes)
    assert not list(tmp_path.iterdir())


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"short": data[:-1], "long": data + b"0", "text": b"hello", "empty": b""}[how])


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("images.npy", "short", r"images.npy is damaged, \d+ bytes instead of \d+"),
        ("images.npy", "long", r"images.npy is damaged, \d+ bytes instead of \d+"),
        ("images.npy", "text", "images.npy is not a .npy file of this project"),
        ("images.npy", "empty", "images.npy is not a .npy file of this project"),
        ("images.npy", "gone", "images.npy is missing"),
        ("labels.npy", "short", "labels.npy is damaged"),
        ("labels.npy", "gone", "labels.npy is missing"),
        ("meta.json", "short", None),
        ("meta.json", "text", "meta.json is damaged or of another version"),
        ("meta.json", "gone", "meta.json is missing"),
    ],
)
def test_damage_is_named_with_the_way_out(folder, name, how, message):
    damage(folder / name, how)
    if message is None:  # the last byte of meta.json is its line end
        PackedImages(folder)
        return
    with pytest.raises(OSError, match=f"{message}.*: delete the folder .*toy and run again$") as caught:
        PackedImages(folder)
    assert "\n" not in str(caught.value)


def test_foreign_array_and_foreign_meta(folder):
    np.save(folder / "images.npy", IMAGES[:, :, :2])
    with pytest.raises(
        OSError, match=r"images.npy is a foreign file, it holds uint8 \(50, 2, 2, 4\) instead of uint8 \(50"
    ):
        PackedImages(folder)
    (folder / "meta.json").write_text(json.dumps({"format": 1, "name": "other"}))
    with pytest.raises(OSError, match="meta.json is damaged or of another version"):
        PackedImages(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: nothing is packed there yet"):
        PackedImages(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_verify_finds_one_changed_bit(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(OSError, match=f"{name} is damaged, its SHA-256 is not meta.json's: delete the folder"):
        PackedImages(folder).verify()


def test_any_damaged_header_byte_is_an_oserror_or_harmless(tmp_path):
    path = tmp_path / "a.npy"
    write_npy(path, IMAGES.shape, np.uint8, [IMAGES])
    data = path.read_bytes()
    refused = 0
    for position in range(len(data) - IMAGES.nbytes):
        for byte in (0x28, 0xFF):
            path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
            try:
                check_npy(path, IMAGES.shape, np.uint8, "way out")
            except OSError:
                refused += 1
    assert refused > 100


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"disk too small for .*toy: needed 67.5 kB, free 1 kB; free space or point root"):
        pack_toy(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_meanwhile(tmp_path):
    def chunks():
        yield IMAGES[:10]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*toy was not written, nothing of it is left; free"):
        pack_toy(tmp_path / "toy", chunks())
    assert not list(tmp_path.iterdir())


def test_a_really_full_disk(tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    try:
        big = np.zeros((1000, *SHAPE), np.uint8)
        options = {"count": 20_000, "labels": np.zeros(20_000, int)}
        with pytest.raises(OSError, match="disk too small"):
            pack_toy(tmp_path / "toy", [big] * 20, **options)
        monkeypatch.setattr("datamodules.packing.require_space", lambda folder, needed: None)
        with pytest.raises(OSError, match="No space left on device: .*toy was not written"):
            pack_toy(tmp_path / "toy", [big] * 20, **options)
        assert not list(tmp_path.iterdir())
        pack_toy(tmp_path / "toy").verify()
    finally:
        subprocess.run(["umount", tmp_path], check=True)

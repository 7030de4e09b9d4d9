import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.components import partial_folder
from datamodules.components.npy_files import check_npy, write_npy
from datamodules.components.packed_images import PackedImages, pack
from stillhouse.checkpoints.block_hashes import hash_range
from stillhouse.files import write_json

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


class Killed:
    """Chunks from an image number on; the process that has written `until` images is killed while it waits for more."""

    def __init__(self, until: int | None = None):
        self.until = until
        self.reached = FORK.Event()
        self.starts: list[int] = []

    def __call__(self, start: int):
        self.starts.append(start)
        for first in range(start, COUNT, 10):
            if first == self.until:
                self.reached.set()
                signal.pause()
            yield IMAGES[first : first + 10]


def kill_at(until: int, folder: Path, **options) -> None:
    """Pack in a child that SIGKILL ends once it has written `until` images and noted all of them."""
    chunks = Killed(until)
    child = FORK.Process(target=pack_toy, args=(folder, chunks), kwargs={"identity": "a", **options})
    child.start()
    assert chunks.reached.wait(20)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert [path.name for path in folder.parent.iterdir()] == ["toy.partial"]


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(partial_folder, "SAVE_SECONDS", 0)


def resume(folder: Path, identity: str | None = "a", **changes) -> tuple[list[int], PackedImages]:
    chunks = Killed()
    return chunks.starts, pack_toy(folder, chunks, identity=identity, **changes)


@pytest.mark.parametrize("kills", [(30,), (20, 40)])
def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tmp_path, noted, capsys, kills):
    for images in kills:
        kill_at(images, tmp_path / "toy")
    starts, packed = resume(tmp_path / "toy")
    assert starts == [kills[-1]]
    assert f"toy.partial: going on after {kills[-1]} images" in capsys.readouterr().out
    packed.verify()
    once = pack_toy(tmp_path / "once")
    assert packed.meta == once.meta
    for name in ("images.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "toy" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "toy")) == ["images.npy", "labels.npy", "meta.json"]
    assert sorted(os.listdir(tmp_path)) == ["once", "toy"]
    assert np.array_equal(pack_toy(tmp_path / "toy", 255 - IMAGES).images, IMAGES)  # what is there stays


def test_unnoted_work_is_done_again(tmp_path):
    kill_at(30, tmp_path / "toy")  # within the first ten seconds
    starts, packed = resume(tmp_path / "toy")
    assert starts == [0]
    assert packed.hash == pack_toy(tmp_path / "once").hash


@pytest.mark.parametrize(
    "changes",
    [{"identity": "b"}, {"identity": None}, {"meta": {**META, "preprocessing": "other"}}],
    ids=["another source", "no identity", "other options"],
)
def test_a_partial_folder_of_another_source_or_options_is_begun_anew(tmp_path, noted, changes):
    kill_at(30, tmp_path / "toy")
    (tmp_path / "toy.partial" / "foreign").touch()
    starts, packed = resume(tmp_path / "toy", **changes)
    assert starts == [0]
    packed.verify()
    assert not (tmp_path / "toy" / "foreign").exists()


@pytest.mark.parametrize("damage", ["bit", "short", "header", "note", "cut note", "no note"])
def test_bytes_that_a_crash_has_lost_are_not_trusted(tmp_path, noted, damage):
    kill_at(30, tmp_path / "toy")
    path, note = (tmp_path / "toy.partial" / name for name in ("images.npy", "progress.json"))
    data, said = path.read_bytes(), note.read_text()
    offset = len(data) - 30 * IMAGES[0].nbytes
    flipped = bytes([data[offset + 100] ^ 1])
    path.write_bytes(
        {
            "bit": data[: offset + 100] + flipped + data[offset + 101 :],
            "short": data[:-1],
            "header": b"0" + data[1:],
        }.get(damage, data)
    )
    note.write_text({"note": "[]", "cut note": said[:-20]}.get(damage, said))
    if damage == "no note":
        note.unlink()
    starts, packed = resume(tmp_path / "toy")
    assert starts == [0]
    packed.verify()
    assert np.array_equal(packed.images, IMAGES)


def test_bytes_beyond_the_note_are_dropped(tmp_path, noted):
    kill_at(30, tmp_path / "toy")
    with open(tmp_path / "toy.partial" / "images.npy", "ab") as file:
        file.write(b"written, not noted")
    starts, packed = resume(tmp_path / "toy")
    assert starts == [30]
    assert np.array_equal(packed.images, IMAGES)


def test_an_interrupted_one_keeps_its_work_and_an_error_leaves_nothing(tmp_path, noted):
    def chunks(error):
        def start(first):
            yield IMAGES[first:20]
            raise error

        return start

    with pytest.raises(KeyboardInterrupt):
        pack_toy(tmp_path / "toy", chunks(KeyboardInterrupt()), identity="a")
    assert os.listdir(tmp_path) == ["toy.partial"]
    assert resume(tmp_path / "toy")[0] == [20]
    with pytest.raises(OSError, match="broken"):
        pack_toy(tmp_path / "other", chunks(OSError("broken")), identity="a")
    assert os.listdir(tmp_path) == ["toy"]


def pack_toy_aloud(folder, images, said, **changes):
    """With what it prints in a file: pytest's capture must not be read while another process writes into it."""
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        pack_toy(folder, images, **changes)


def wait_for_line(said, process):
    while not (said.exists() and said.read_text().endswith("waiting\n")):
        assert process.is_alive()
        time.sleep(0.01)


def test_of_two_packers_the_second_waits_for_the_first(tmp_path):
    inside, go_on = FORK.Event(), FORK.Event()

    def slow(start):
        inside.set()
        assert go_on.wait(20)
        yield IMAGES

    def never(start):
        raise AssertionError("packed twice")

    children = [FORK.Process(target=pack_toy, args=(tmp_path / "toy", slow))]
    children[0].start()
    assert inside.wait(20)
    said = tmp_path / "said"
    children.append(FORK.Process(target=pack_toy_aloud, args=(tmp_path / "toy", never, said)))
    children[1].start()
    wait_for_line(said, children[1])
    go_on.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert said.read_text() == f"{tmp_path / 'toy'}: another process makes it, waiting\n"
    assert sorted(os.listdir(tmp_path)) == ["said", "toy"]
    PackedImages(tmp_path / "toy").verify()


def test_of_several_processes_at_once_one_packs_and_all_read(tmp_path):
    together = FORK.Barrier(4)

    def race():
        together.wait(20)
        pack_toy(tmp_path / "toy").verify()

    children = [FORK.Process(target=race) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert os.listdir(tmp_path) == ["toy"]


def test_who_waits_goes_on_where_the_first_died(tmp_path, noted):
    chunks = Killed(30)
    first = FORK.Process(target=pack_toy, args=(tmp_path / "toy", chunks), kwargs={"identity": "a"})
    first.start()
    assert chunks.reached.wait(20)
    said = tmp_path / "said"
    second = FORK.Process(target=pack_toy_aloud, args=(tmp_path / "toy", Killed(), said), kwargs={"identity": "a"})
    second.start()
    wait_for_line(said, second)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join()
    assert second.exitcode == 0
    assert "going on after 30 images" in said.read_text()
    assert PackedImages(tmp_path / "toy").hash == pack_toy(tmp_path / "once").hash


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(lock, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OSError, match=r"toy.partial lies on a disk without file locks .*; set data.root"):
        pack_toy(tmp_path / "toy")


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
        path.write_bytes(
            {"short": data[:-1], "long": data + b"0", "text": b"hello", "deep": 200_000 * b"[", "empty": b""}[how]
        )


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
        ("meta.json", "deep", "meta.json is damaged or of another version"),
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


def one_bit(values: np.ndarray) -> None:
    values.reshape(-1)[-1] ^= 1


def noise(values: np.ndarray) -> None:
    values[:] = np.random.default_rng(5).integers(0, 2, values.shape)


def change(path: Path, how) -> None:
    values = np.load(path)
    how(values)
    np.save(path, values)


@pytest.mark.parametrize(("name", "how"), [("images.npy", one_bit), ("images.npy", noise), ("labels.npy", noise)])
@pytest.mark.parametrize("everything", [False, True])
def test_any_change_of_a_small_file_is_found_at_every_start(folder, name, how, everything):
    change(folder / name, how)
    with pytest.raises(
        OSError, match=f"{name} is damaged, its SHA-256 is not meta.json's: delete the folder .*toy and"
    ):
        PackedImages(folder).verify(everything)


def test_of_a_long_file_a_few_blocks_are_compared_at_each_start_and_all_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("stillhouse.checkpoints.block_hashes.BLOCK", 64)
    folder = tmp_path / "toy"
    packed = pack_toy(folder)
    data = IMAGES.tobytes()
    blocks = [sha256(data[start : start + 64]).hexdigest()[:32] for start in range(0, len(data), 64)]
    assert packed.meta["blocks"]["images.npy"] == blocks
    read = []
    monkeypatch.setattr(
        "stillhouse.checkpoints.block_hashes.hash_range", lambda *place: read.append(place) or hash_range(*place)
    )
    for _ in range(30):
        packed.verify(everything=False)
    images = [place for place in read if place[0].name == "images.npy"]
    assert len(images) == 30 * 4  # bounded
    assert all(size <= 64 for _, _, size in images)
    assert len({start for _, start, _ in images}) > len(blocks) / 2  # others each time
    change(folder / "images.npy", one_bit)
    message = "images.npy is damaged, its SHA-256 is not meta.json's"
    with pytest.raises(OSError, match=message):
        packed.verify()
    with pytest.raises(OSError, match=message):
        for _ in range(1000):
            packed.verify(everything=False)
    change(folder / "images.npy", noise)
    with pytest.raises(OSError, match=message):
        packed.verify(everything=False)


def test_a_long_file_of_an_earlier_version_has_one_hash_which_is_compared_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("stillhouse.checkpoints.block_hashes.BLOCK", 64)
    folder = tmp_path / "toy"
    meta = pack_toy(folder).meta
    del meta["blocks"]
    write_json(folder / "meta.json", meta)
    for everything in (False, True):
        PackedImages(folder).verify(everything)
    change(folder / "images.npy", one_bit)
    PackedImages(folder).verify(everything=False)
    with pytest.raises(OSError, match="images.npy is damaged, its SHA-256 is not meta.json's"):
        PackedImages(folder).verify()


def test_labels_out_of_range_are_damage(folder):
    change(folder / "labels.npy", lambda labels: labels.__setitem__(3, 7))
    with pytest.raises(
        OSError, match=r"labels.npy is damaged, labels 0 to 7 of 3 classes: delete the folder .*toy and"
    ):
        PackedImages(folder)


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
        monkeypatch.setattr("datamodules.components.packed_images.require_space", lambda folder, needed: None)
        with pytest.raises(OSError, match="No space left on device: .*toy was not written"):
            pack_toy(tmp_path / "toy", [big] * 20, **options)
        assert not list(tmp_path.iterdir())
        pack_toy(tmp_path / "toy").verify()
    finally:
        subprocess.run(["umount", tmp_path], check=True)

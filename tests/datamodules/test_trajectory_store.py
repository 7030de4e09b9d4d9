import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from gaussian_teacher import GaussianTeacher

from datamodules.components.trajectory_store import TrajectoryStore, decode
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, TRAIN_SEEDS, sample_labels, sample_noise

FORK = multiprocessing.get_context("fork")
SHAPE = (2, 4, 4)


def store_of(root, teacher=None, **changes) -> TrajectoryStore:
    options = {"count": 20, "first_seed": TRAIN_SEEDS, "shard_size": 8, "batch_size": 3, **changes}
    return TrajectoryStore(root, teacher or GaussianTeacher(), **options)


def solved(count=20, first_seed=TRAIN_SEEDS, **options) -> torch.Tensor:
    """All states (count, steps, C, H, W), straight from the teacher."""
    seeds = torch.arange(count) + first_seed
    return torch.stack([*GaussianTeacher(**options).trajectory(sample_noise(seeds, SHAPE), sample_labels(seeds, 4))], 1)


def shard_bytes(store) -> list[bytes]:
    return [store.shards.path(shard).read_bytes() for shard in range(len(store.shards))]


def everything(store) -> torch.Tensor:
    return decode(store.states(np.arange(len(store))))


def test_end_points_are_the_teachers_within_half_a_byte(tmp_path):
    store = store_of(tmp_path)
    store.fill()
    states = store.states(np.arange(20))
    assert states.dtype == torch.uint8
    assert states.shape == (20, 1, *SHAPE)
    truth = solved()[:, -1:].clamp(-1, 1)
    assert (decode(states) - truth).abs().max() <= 0.5 / 127.5 + 1e-6
    assert len(set(store.states(np.arange(20)).flatten().tolist())) > 50
    store.verify()
    store.spot_check()


@pytest.mark.parametrize(("dtype", "relative"), [("float16", 2**-11), ("float32", 2**-24)])
def test_paths_keep_the_chosen_steps_within_the_dtypes_rounding(tmp_path, dtype, relative):
    store = store_of(tmp_path, keep=[1, 3, 5], dtype=dtype)
    store.fill()
    states = store.states(np.arange(20))
    assert states.dtype == getattr(torch, dtype)
    truth = solved()[:, [0, 2, 4]]
    assert truth.abs().max() > 10  # intermediate states are no images
    assert ((decode(states) - truth).abs() <= relative * 1.001 * truth.abs() + 2**-24).all()
    store.verify()
    store.spot_check(20)


def test_states_come_in_the_asked_order_across_shards(tmp_path):
    store = store_of(tmp_path, dtype="float32")
    store.fill()
    indices = np.array([19, 0, 7, 8, 8, 3, 16])
    assert torch.equal(store.states(indices), everything(store)[indices])
    for wrong in (20, -1):
        with pytest.raises(IndexError, match="exceed 20 entries"):
            store.states(np.array([wrong]))


def test_unconditional_teacher(tmp_path):
    teacher = GaussianTeacher(num_classes=0)
    store = store_of(tmp_path, teacher, dtype="float32")
    store.fill()
    noise = sample_noise(torch.arange(20) + TRAIN_SEEDS, SHAPE)
    *_, truth = teacher.trajectory(noise)
    assert torch.equal(everything(store)[:, 0], truth.float())


def test_the_sampling_batch_changes_nothing_but_rounding(tmp_path):
    stores = [store_of(tmp_path / str(size), batch_size=size, dtype="float32") for size in (1, 8)]
    for store in stores:
        store.fill()
    assert torch.allclose(everything(stores[0]), everything(stores[1]), atol=1e-6)


def test_a_larger_count_extends_the_same_store(tmp_path):
    small = store_of(tmp_path, count=13)
    small.fill()
    assert [path.name for path in sorted(small.folder.glob("*.npy"))] == ["shard-00000.npy", "shard-00001-first-5.npy"]
    before, states = small.shards.path(0).stat().st_ino, everything(small)
    large = store_of(tmp_path, count=20)
    assert large.estimate() == (8 + 4) * 32 + 2 * 160  # the shard that was not full is sampled again
    large.fill()
    assert large.shards.path(0).stat().st_ino == before
    assert torch.equal(states, everything(large)[:13])
    assert large.estimate() == store_of(tmp_path, count=13).estimate() == 0
    assert torch.equal(everything(store_of(tmp_path, count=13)), states)


def test_a_tiny_store_samples_no_more_than_it_is_asked_for(tmp_path):
    teacher, solved = GaussianTeacher(), []
    sample = teacher.trajectory
    teacher.trajectory = lambda noise, *args, **options: solved.append(len(noise)) or sample(noise, *args, **options)
    store = store_of(tmp_path, teacher, count=5, shard_size=1024, batch_size=256)
    store.fill()
    assert sum(solved) == 5
    assert len(everything(store)) == 5


def test_address_depends_on_all_that_decides_the_states_and_on_nothing_else(tmp_path):
    def address(teacher_changes=None, attributes=None, **changes):
        teacher = GaussianTeacher(**(teacher_changes or {}))
        vars(teacher).update(attributes or {})
        return store_of(tmp_path, teacher, **changes).folder.name

    base = address()
    assert base == address(count=1000) == address(batch_size=7) == address(attributes={"delay": 1.0})
    others = [
        address(attributes={"hash": "cd" * 32}),
        address(attributes={"solver_name": "heun"}),
        address({"sigma_max": 20.000001}),
        address({"num_classes": 5}),
        address({"num_classes": 0}),
        address({"resolution": 8}),
        address({"channels": 1}),
        address(steps=6),
        address(dtype="float16"),
        address(dtype="float16", keep=[2, 5]),
        address(dtype="float16", keep=[3, 5]),
        address(first_seed=HELD_OUT_SEEDS),
        address(shard_size=16),
    ]
    assert len({base, *others}) == len(others) + 1
    assert all(name.startswith("gauss-") for name in others)
    assert address({"name": "a/b c"}).startswith("a-b-c-")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": [2, 5]}, r"dtype=uint8 holds end points alone \(keep=\[5\]\), .*set dtype to float16 or float32"),
        ({"keep": [4]}, r"dtype=uint8 holds end points alone"),
        ({"keep": [5, 2], "dtype": "float16"}, r"keep must be rising solver steps among 1 .. 5, got \[5, 2\]"),
        ({"keep": [5, 6], "dtype": "float16"}, r"keep must be rising solver steps among 1 .. 5, got \[5, 6\]"),
        ({"keep": [], "dtype": "float16"}, r"keep must be rising solver steps"),
        ({"keep": [0, 5], "dtype": "float16"}, r"keep\[0\] must be an integer of at least 1, got 0"),
        ({"dtype": "bfloat16"}, "dtype must be one of uint8, float16, float32, got 'bfloat16'"),
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
    ],
)
def test_misuse(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        store_of(tmp_path, **changes)


def test_killed_while_filling_resumes_with_identical_bits(tmp_path):
    whole = store_of(tmp_path / "whole", count=40)
    whole.fill()
    store = store_of(tmp_path / "killed", count=40)
    slow = store_of(tmp_path / "killed", GaussianTeacher(delay=0.02), count=40)
    child = FORK.Process(target=slow.fill)
    child.start()
    while not store.shards.path(1).exists():
        time.sleep(0.001)
    time.sleep(0.1)  # into the third shard
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert 0 < store.estimate() < whole.estimate() + 5 * (8 * 32 + 160)
    assert any(".tmp-" in path.name for path in store.folder.iterdir())
    kept = store.shards.path(0).stat().st_ino

    store.fill()
    assert store.shards.path(0).stat().st_ino == kept
    assert shard_bytes(store) == shard_bytes(whole)
    assert not any(".tmp-" in path.name for path in store.folder.iterdir())


@pytest.mark.parametrize("count", [20, 30, 8])
def test_two_processes_write_the_bits_of_one(tmp_path, count):
    one, two = store_of(tmp_path / "one", count=count), store_of(tmp_path / "two", count=count)
    one.fill()
    barrier = FORK.Barrier(2)
    children = [FORK.Process(target=two.fill, args=("cpu", r, 2, lambda: barrier.wait(20))) for r in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert shard_bytes(two) == shard_bytes(one)


def test_each_rank_samples_its_own_shards(tmp_path):
    store = store_of(tmp_path, count=40)
    store.fill(rank=1, world_size=3)
    assert store.shards.missing() == [0, 2, 3]


def test_a_shard_that_is_not_visible_is_said_so(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="shard-00001.npy of another rank is not visible here: set root to a folder"
    ):
        store_of(tmp_path).fill(rank=0, world_size=2, barrier=lambda: None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda data: data[:-40], r"shard-00001.npy is damaged, \d+ bytes instead of \d+"),
        (lambda data: b"hello", "shard-00001.npy is not a .npy file of this project"),
        (lambda data: data.replace(b"(8, 1, 2, 4, 4)", b"(8, 1, 2, 2, 8)"), "shard-00001.npy is a foreign file"),
    ],
)
def test_a_damaged_shard_is_named_and_only_it_is_sampled_again(tmp_path, how, message):
    store = store_of(tmp_path)
    store.fill()
    good = shard_bytes(store)
    path = store.shards.path(1)
    path.write_bytes(how(good[1]))
    way_out = "delete this file and run again, only it will be sampled again$"
    for use in (store.fill, store.verify, lambda: store_of(tmp_path).states(np.array([9]))):
        with pytest.raises(OSError, match=f"{message}.*: {way_out}"):
            use()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"shard-00001.npy is missing: {way_out}"):
        store.states(np.array([9]))
    untouched = store.shards.path(0).stat().st_ino
    store.fill()
    assert shard_bytes(store) == good
    assert store.shards.path(0).stat().st_ino == untouched


def test_a_changed_bit_is_found_in_some_shards_at_each_start_and_in_all_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.components.shards.BLOCK", 64)  # one shard has as many bytes as are read at a start
    store = store_of(tmp_path, count=40)
    store.fill()
    path = store.shards.path(2)
    data = bytearray(path.read_bytes())
    data[-33] ^= 1  # the last byte before the hash
    path.write_bytes(data)
    store.shards.missing()  # header and size are as they should be
    message = "shard-00002.npy is damaged, its data do not have the recorded SHA-256: delete this file and run again"
    with pytest.raises(OSError, match=message):
        store.verify()
    with pytest.raises(OSError, match=message):
        for _ in range(1000):
            store.verify(everything=False)
    found = []
    monkeypatch.setattr("datamodules.components.shards.hash_range", lambda path, *_: found.append(path) or "")
    with pytest.raises(OSError, match="damaged"):
        store.verify(everything=False)
    assert len(found) == 1


@pytest.mark.parametrize(("dtype", "keep"), [("uint8", None), ("float16", [1, 5]), ("float32", [5])])
def test_spot_check_finds_a_tampered_entry_and_another_teacher(tmp_path, dtype, keep):
    store = store_of(tmp_path, dtype=dtype, keep=keep)
    store.fill()
    store.spot_check(4)
    path = store.shards.path(2)
    data = bytearray(path.read_bytes())
    size = store.shards.entry_bytes
    last = len(data) - 32 - size
    data[last : last + size] = data[last - size : last]  # the entry before it in its place
    path.write_bytes(data)
    fresh = store_of(tmp_path, dtype=dtype, keep=keep)
    message = "shard-00002-first-4.npy: entry 19 is not what teacher gauss gives now; delete this file and run again"
    with pytest.raises(OSError, match=message):
        fresh.spot_check(4)
    path.unlink()
    fresh = store_of(tmp_path, dtype=dtype, keep=keep)
    fresh.fill()
    fresh.spot_check(4)
    fresh.teacher.shift = 0.05  # as changed code would, under the same hash
    with pytest.raises(OSError, match="entry 0 is not what teacher gauss gives now"):
        fresh.spot_check(4)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "uint8"), (1e6, "float16")])
def test_states_that_are_not_finite_are_refused(tmp_path, value, dtype):
    teacher = GaussianTeacher()
    teacher.shift = value
    with pytest.raises(ValueError, match=f"teacher gauss gave states that are not finite in {dtype}"):
        store_of(tmp_path, teacher, dtype=dtype).fill()
    assert [path.name for path in store_of(tmp_path).folder.parent.glob("*/*")] == ["meta.json"]


def test_estimate_is_printed_and_is_what_the_disk_holds(tmp_path, capsys):
    store = store_of(tmp_path, count=200)
    estimate = store.estimate()
    store.fill()
    assert estimate == sum(path.stat().st_size for path in store.folder.glob("*.npy"))
    out = capsys.readouterr().out
    assert f"{store.folder}: sampling 200 trajectories of 5 steps, 10.4 kB on disk (" in out
    store.fill()
    assert not capsys.readouterr().out
    store_of(tmp_path / "b").fill(rank=1, world_size=2)
    assert not capsys.readouterr().out


def test_too_small_a_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 1000))
    with pytest.raises(OSError, match=r"disk too small for .*gauss-\w+: needed 1.12 kB, free 1 kB; free space"):
        store_of(tmp_path).fill()
    assert not list(tmp_path.iterdir())
    store_of(tmp_path, count=16).fill()  # two shards, 832 bytes

"""Two processes from the command line do what one does with the same global batch."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch
from end_to_end_tools import (
    RUN,
    STUDENT,
    assert_same_run,
    die,
    in_call,
    leaves,
    read_checkpoint,
    read_csv,
    read_json,
    train,
    with_data,
)
from safetensors.torch import load_file

OPTIONS = (*STUDENT, "method.lr=3e-4")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(folder, *OPTIONS).ok()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    ended = train(folder, *OPTIONS, "trainer.devices=2", fresh=True).ok()
    return folder, ended


def test_they_learn_the_same(one, two):
    folder, _ = two
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (leaves(read_checkpoint(f / RUN / "checkpoints" / name)) for f in (folder, one))
        assert ours["/global_step"] == theirs["/global_step"]
        compared = [path for path, value in theirs.items() if isinstance(value, torch.Tensor)]
        assert sum("/state_dict/student" in path for path in compared) > 50
        for path in compared:
            torch.testing.assert_close(ours[path], theirs[path], rtol=1e-5, atol=1e-6, msg=path)
    for path, value in load_file(one / RUN / "student.safetensors").items():
        torch.testing.assert_close(load_file(folder / RUN / "student.safetensors")[path], value, rtol=0, atol=1e-6)
    rows, expected = (read_csv(f / RUN / "metrics.csv") for f in (folder, one))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key in ("loss/student", "heldout/loss", "fid_digits_20/ema_500kimg"):
            assert bool(row[key]) == bool(other[key])
            if row[key]:
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-5)


def test_they_measure_the_same(one, two):
    """Teacher, student and real images, each measured by both processes together."""
    folder, _ = two
    ours, theirs = (read_json(f / RUN / "metrics.json") for f in (folder, one))
    assert len(ours) == len(theirs) == 3
    for record, other in zip(ours, theirs, strict=True):
        assert record.pop("values") == pytest.approx(other.pop("values"), rel=1e-6)
        mean = other.pop("mean")
        assert record.pop("mean") == pytest.approx(mean, rel=1e-6)
        assert record.pop("std") == pytest.approx(other.pop("std"), rel=1e-5, abs=1e-6 * mean)
        assert record == other


def test_they_make_the_same_pairs(one, two):
    """Each of the two processes samples every second shard; bit for bit what one process samples."""
    folder, _ = two
    shards = sorted(path.relative_to(one) for path in (one / "data/trajectories").rglob("*.npy"))
    assert len(shards) == 2
    assert all((folder / path).read_bytes() == (one / path).read_bytes() for path in shards)


def test_there_is_one_run_whose_files_are_written_once(one, two):
    folder, ended = two
    names = [{str(path.relative_to(f)) for path in f.rglob("*") if "tfevents" not in path.name} for f in (one, folder)]
    assert names[0] == names[1]
    assert len(list((folder / RUN / "tensorboard").glob("events*"))) == 1
    assert ended.out.count("fingerprint") == 1
    assert [ended.out.count(f"sampling {count} trajectories") for count in (64, 16)] == [1, 1]
    lines = [line for line in ended.err.splitlines() if line.strip()]
    size = sum(4 * value.numel() for value in load_file(folder / RUN / "student.safetensors").values())
    traffic = f"2 processes | each gives {size / 1e6:.4g} MB of gradients to all-reduce in a step"
    assert [line for line in lines if "img" not in line] == [traffic]  # beside that, progress alone


# -- what goes wrong --------------------------------------------------------------------------------------------------


def processes(folder):
    """Commands of running processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text()
        except OSError:  # ended meanwhile
            continue
        if str(folder) in command:
            found.append(command.replace("\0", " "))
    return found


def killed(original, *args):
    assert len(processes(Path.cwd())) == 1  # the second process's command names the run's folder
    die()


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_process_and_goes_on_exactly(two, tmp_path):
    folder, _ = two
    with_data(folder, tmp_path)
    step = "lightning_modules:DenoisingStudent.training_step"
    train(tmp_path, *OPTIONS, "trainer.devices=2", before=partial(in_call, step, 8, killed)).killed()
    for _ in range(300):
        if not processes(tmp_path):
            break
        time.sleep(0.1)
    assert not processes(tmp_path)
    train(tmp_path, *OPTIONS, "trainer.devices=2").ok()
    assert_same_run(tmp_path / RUN, folder / RUN)


def test_errors_are_said_once_and_a_sweep_goes_on(one, tmp_path):
    """Three jobs of two processes: both fail, the second fails, none fails."""
    with_data(one, tmp_path)
    fails = ("+callbacks.fails._target_=end_to_end_spy.Fails", "+callbacks.fails.where=both,second,none")
    ended = train(tmp_path, "--multirun", *OPTIONS, *fails, "trainer.devices=2")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    said = [line.partition(": ")[2].partition(": ")[2] for line in ended.errors]
    failed = "another process of this run failed, see its message above: rank 1 (exit code 1)"
    assert said == ["failed in both", "failed in second", failed]
    runs = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert sorted((run / "metrics.json").exists() for run in runs) == [False, False, True]
    assert not processes(tmp_path)

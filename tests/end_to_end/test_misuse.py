"""Bad input and broken files: one clear line that names the thing and the way out, exit code 1, nothing overwritten."""

import os
import shutil
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from end_to_end_tools import (
    PRETRAIN,
    RUN,
    STUDENT,
    assert_same_run,
    copied,
    die,
    in_call,
    leaves,
    read_checkpoint,
    snapshot,
    train,
    with_data,
)
from safetensors.torch import load_file, save_file

STEP = "lightning_modules:DenoisingStudent.training_step"


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A complete run, which no misuse may change."""
    return copied(finished, tmp_path_factory.mktemp("misuse"))


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # values that cannot be
        ("seed=4294967296", ["seed=4294967296 is too large", "from 0 to 4294967295"]),
        ("method.loss=l9", ["method.loss='l9' is unknown; choose one of l1, l2, huber"]),
        (
            "trainer.validate_every_n_steps=0",
            ["trainer.validate_every_n_steps must be an integer of at least 1, got 0"],
        ),
        ("trainer.devices=x", ["trainer.devices='x': give a positive number"]),
        ("trainer.accelerator=abacus", ["accelerator='abacus'", "cpu"]),
        ("batch_size=15 trainer.devices=2", ["batch_size=15", "2 processes of trainer.devices"]),
        ("method.held_out=15 trainer.devices=2", ["method.held_out=15 can't be shared by the 2 processes"]),
        ("trainer.strategy=dpp", ["trainer.strategy=dpp is unknown; choose auto, averaged, ddp, ddp_find_unused"]),
        ("trainer.strategy=fsdp", ["trainer.strategy=fsdp is not supported: it cuts one network into pieces"]),
        ("callbacks.requeue.every_n_steps=0", ["Requeue: every_n_steps must be at least 1, got 0"]),
        ("teacher.solver=dpm", ["teacher.solver='dpm' is unknown; choose one of euler, heun"]),
        # values that do not fit together, which would show only after training
        ("teacher.network.num_classes=3", ["num_classes=3", "digits 10"]),
        ("teacher.conditional=false", ["num_classes in use=0", "digits 10"]),
        ("data.resolution=16 teacher.network.resolution=8", ["resolution=8", "digits 16"]),
        ("evaluation.metrics=[fid,lpips]", ["metrics lpips are unknown; choose among fid"]),
        # weights
        ("teacher.weights=nothing.safetensors", ["no weights at", "nothing.safetensors", "method=pretrain"]),
        ("teacher.weights=pretrained/digits_classifier.safetensors", ["does not fit this SongUNet", "missing: "]),
    ],
)
def test_wrong_options(folder, options, message):
    """Under a new name, so that it is not the changed config that is refused; by plan=true as well."""
    before = snapshot(folder)
    named = [option for option in STUDENT if not option.startswith("name=")]
    refusing = ["plan=false", "plan=true"]
    if "no weights at" in message:  # plan lists what is missing
        refusing.remove("plan=true")
    for plan in refusing:
        train(folder, *named, "name=new", plan, *options.split()).refused("error: runs/new: ", *message)
    assert snapshot(folder) == before
    shutil.rmtree(folder / "runs" / "new", ignore_errors=True)


# -- files ------------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damaged(path: Path) -> None:
    """One bit is another one."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def of_another_shape(path: Path) -> None:
    state = load_file(path)
    name = max(state, key=lambda key: state[key].numel())
    save_file(state | {name: state[name][:-1].clone()}, path)


def with_a_function(path: Path) -> None:
    torch.save(read_checkpoint(path) | {"extra": os.system}, path)


def changed(change):
    def breakage(path: Path) -> None:
        content = read_checkpoint(path)
        change(content)
        torch.save(content, path)

    return breakage


def of_another_method(content: dict) -> None:
    content["run"]["method"] = "sfd"


def of_another_config(content: dict) -> None:
    content["run"]["config"] = "0" * 16


def as_before_the_name(content: dict) -> None:
    """With a weight of another shape, as of another network."""
    del content["run"]
    name = max(content["state_dict"], key=lambda key: content["state_dict"][key].numel())
    content["state_dict"][name] = content["state_dict"][name][:-1].clone()


def of_integers(content: dict) -> None:
    """Which torch would take for weights without a word."""
    weights = content["state_dict"]
    weights |= {name: (100 * value).to(torch.int8) for name, value in weights.items() if value.ndim > 1}


def of_integer_averages(content: dict) -> None:
    for average in content["callbacks"]["EMA"]["averages"].values():
        average |= {name: (100 * value).to(torch.int8) for name, value in average.items() if value.ndim > 1}


def without_weights(content: dict) -> None:
    del content["state_dict"]


def without_optimiser(content: dict) -> None:
    del content["optimizer_states"]


def not_json(path: Path) -> None:
    path.write_text("{")


LAST = "runs/run/checkpoints/last.ckpt"
BEST = "runs/run/checkpoints/best.ckpt"
WAY_OUT = ["put an older copy back, or remove last.ckpt"]
OWN = "put the run's own last.ckpt back"


@pytest.mark.parametrize(
    ("pattern", "breakage", "options", "message"),
    [
        ("runs/run/checkpoints/last.ckpt", truncated, (), ["damaged or cut short", *WAY_OUT]),
        ("runs/run/checkpoints/last.ckpt", damaged, (), ["damaged or cut short", *WAY_OUT]),
        ("runs/run/checkpoints/last.ckpt", with_a_function, (), ["holds objects other than tensors", *WAY_OUT]),
        (LAST, changed(of_another_method), (), ["of another method (sfd, and this run's is denoising_student)", OWN]),
        (LAST, changed(of_another_config), (), ["of another configuration (0000000000000000, and this run's is", OWN]),
        (LAST, changed(as_before_the_name), (), ["does not fit this DenoisingStudent", "of another shape"]),
        (LAST, changed(of_integers), (), ["does not fit this DenoisingStudent: of another kind", "int8"]),
        (BEST, changed(of_integer_averages), (), ["does not fit this Denoiser: of another kind", "int8"]),
        (LAST, changed(without_weights), (), ["has no state_dict", *WAY_OUT]),
        (LAST, changed(without_optimiser), (), ["can't be resumed, it lacks optimizer_states", *WAY_OUT]),
        ("runs/run/config.yaml", not_json, (), ["can't be read", "restore or remove it"]),
        ("data/trajectories/*/shard-00000*.npy", truncated, ("name=new",), ["delete this file and run again"]),
        ("data/digits/images.npy", truncated, ("name=new",), ["delete the folder data/digits and run again"]),
        ("data/digits/meta.json", not_json, ("name=new",), ["delete the folder data/digits and run again"]),
        ("runs/run/student.safetensors", truncated, ("name=new", "teacher.weights={}"), ["damaged, cut short"]),
        ("runs/run/student.safetensors", of_another_shape, ("name=new", "teacher.weights={}"), ["is not that of"]),
        ("data/statistics/*.npz", truncated, ("name=new",), ["data/statistics/"]),
    ],
)
def test_broken_files(finished, tmp_path, pattern, breakage, options, message):
    """The file is named, and it and everything else that the run had stay as they were."""
    copied(finished, tmp_path)
    (tmp_path / RUN / "metrics.json").unlink()  # the run is not complete
    path = sorted(tmp_path.glob(pattern))[0]
    breakage(path)
    before = snapshot(tmp_path)
    replaced = {option.partition("=")[0] for option in options}
    kept = [option for option in STUDENT if option.partition("=")[0] not in replaced]
    ended = train(tmp_path, *kept, *(option.format(path) for option in options))
    ended.refused(str(path.relative_to(tmp_path)), *message)
    assert before.items() <= snapshot(tmp_path).items()
    assert not list((tmp_path / "runs").rglob("metrics.json"))


def test_checkpoints_without_their_config_are_not_taken_over(finished, tmp_path):
    copied(finished, tmp_path)
    (tmp_path / RUN / "config.yaml").unlink()
    before = snapshot(tmp_path)
    train(tmp_path, *STUDENT).refused("runs/run holds no run (no config.yaml)")
    assert snapshot(tmp_path) == before


# -- a disk that is full ----------------------------------------------------------------------------------------------


def nearly_full(free):
    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(10**9, 10**9 - free, free)


def test_pairs_that_do_not_fit_are_not_begun(finished, tmp_path):
    with_data(finished, tmp_path, "trajectories")
    before = snapshot(tmp_path)
    ended = train(tmp_path, *STUDENT, before=partial(nearly_full, 3_000))
    ended.refused("disk too small for data/trajectories/", "needed 4.26 kB, free 3 kB", "free space")
    assert before.items() <= snapshot(tmp_path).items()
    assert not (tmp_path / "data" / "trajectories").exists()


def killed(original, *args, **kwargs):
    die()


@contextmanager
def on_a_full_disk(original, path):
    with original(path) as temporary:
        temporary.symlink_to("/dev/full")
        yield temporary


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one(finished, tmp_path):
    with_data(finished, tmp_path)
    train(tmp_path, *STUDENT, before=partial(in_call, STEP, 8, killed)).killed()
    last = tmp_path / RUN / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    message = "cannot write the checkpoint", "No space left", "the previous one is intact", "Make room and run again"
    full = partial(in_call, "callbacks.checkpoint:atomic_write", 1, on_a_full_disk)
    train(tmp_path, *STUDENT, before=full).refused("runs/run/checkpoints/last.ckpt", *message)
    assert last.read_bytes() == before
    train(tmp_path, *STUDENT).ok()
    assert_same_run(tmp_path / RUN, finished / RUN)


# -- a loss that is no number -----------------------------------------------------------------------------------------


def not_a_number(original, *args):
    return original(*args) * float("nan")


def test_nan_stops_and_the_last_good_checkpoint_stays(finished, tmp_path):
    with_data(finished, tmp_path)
    ended = train(tmp_path, *STUDENT, before=partial(in_call, STEP, 8, not_a_number))
    good = "The last good checkpoint is runs/run/checkpoints/last.ckpt"
    ended.refused("the loss became NaN within steps 7 to 8", good, "Try a lower method.lr", "new run name")
    checkpoint = read_checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 6
    assert all(v.isfinite().all() for v in leaves(checkpoint).values() if isinstance(v, torch.Tensor))
    assert not (tmp_path / RUN / "metrics.json").exists()
    train(tmp_path, *STUDENT).ok()  # this time without: it goes on from there
    assert_same_run(tmp_path / RUN, finished / RUN)


@pytest.mark.parametrize("options", [STUDENT, PRETRAIN], ids=["student", "pretrain"])
def test_a_learning_rate_that_explodes(finished, tmp_path, options):
    with_data(finished, tmp_path)
    train(tmp_path, *options, "method.lr=1e30").refused("steps 1 to 3", "lower method.lr")
    assert not list((tmp_path / RUN).rglob("*.ckpt*"))

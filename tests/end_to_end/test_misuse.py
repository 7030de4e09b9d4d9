"""Bad input and broken files: one clear line that names the thing and the way out, exit code 1, and nothing is touched.

Here is a case of each kind of place in launch/ from which train.py is refused, and of each promise of when: before a folder is
made, memory is taken or pictures are packed. (Those of a method's constructor are in test_trajectory_methods.py.) All other
messages are in the tests of their modules: what Hydra can't compose in launch/test_refused_command_lines.py, types and unknown
options in launch/test_options.py, teachers, trainers and folders of runs in launch/run, the rest beside what refuses it.
"""

import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end_tools import (
    PRETRAIN,
    RUN,
    STUDENT,
    assert_same_run,
    copied,
    evaluate,
    in_call,
    kill_at,
    leaves,
    read_checkpoint,
    snapshot,
    train,
    with_data,
)
from omegaconf import OmegaConf
from picture_files import encoded, folder_of, pattern

STEP = "lightning_modules:DenoisingStudent.training_step"
NEW = (*(option for option in STUDENT if option != "name=run"), "name=new")

# -- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and somebody's own config.yaml, twice."""
    folder = tmp_path_factory.mktemp("misuse") / "here"
    for place in ("conf", "runs/foreign"):
        (folder / place).mkdir(parents=True)
        (folder / place / "config.yaml").write_text("defaults: [data: digits]\n")
    folder_of(folder / "pictures", {f"{i}.png": encoded(pattern(20, 20, shift=i), "PNG") for i in range(12)})
    return folder


PICTURES = (
    *(option for option in PRETRAIN if not option.startswith("evaluation.")),
    *("data=image_folder", "data.path=pictures", "data.resolution=16", "evaluation=pixels"),
    *("teacher.network.channel_mult=[1,2]", "teacher.network.attn_resolutions=[]"),
)
COMMANDS = {"typed": (), "student": NEW, "pretrain": PRETRAIN, "pictures": PICTURES}
# fmt: off
REFUSED = {
    "typed": [
        # What conf/ does not have: the nearest that it has.
        ("method.los=l1", "no option method.los; did you mean method.loss?"),
        ("-m data=digist,digits", "error: sweep: ", "did you mean digits?"),
        ("recipe=sfd_digitz", "recipe=sfd_digitz is not among conf/recipe; did you mean sfd_digits"),  # Hydra passes over it
        ("--config-dir=nowhere", "nowhere' not found"),
        # What a program can't do.
        ("teacher=none method=pretrain", "method=pretrain needs a teacher, or the network of one", "teacher=NAME"),
        ("~evaluation", "evaluation is missing: train.py needs it; say evaluation=NAME (conf/evaluation)"),
        ("sweep=wandb", "sweep=wandb is for W&B: say `wandb sweep conf/sweep/wandb.yaml`"),
        ("batch_size=100000000000", "batch_size=100000000000 (lower it)", "5.12e+04 GB of memory"),  # none of it is allocated
    ],
    "student": [
        ("method.held_out=15 trainer.devices=2", "method.held_out=15 can't be shared by the 2 processes"),
        # What does not fit together, which would show only after training.
        ("teacher.conditional=false plan=true", "num_classes in use=0", "digits 10", "choose a teacher that fits the data"),
        ("data.resolution=16 teacher.network.resolution=8", "resolution=8", "digits 16"),
    ],
    "pretrain": [
        # Names that become paths.
        ("name=../../outside", "name='../../outside' must name a folder", "below runs/, not empty, without .."),
        ("name=foreign", "runs/foreign/config.yaml is not the config of a run", "restore or remove it"),
        ("folder=elsewhere", "folder is not an option: name=NAME makes it runs/NAME"),
        # Something else than a run would be made.
        ("recipe=sfd_cifar10", "recipe=sfd_cifar10 is for another method: method.steps is unknown to Pretrain"),
    ],
    # Before pictures are packed.
    "pictures": [
        ("evaluation=digits", "the digits extractor reads uint8 images (N, 1, 8, 8)", "evaluation=pixels needs no weights",
         "evaluation=none trains without a measurement"),
    ],
}
# fmt: on


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [(command, options, message) for command, rows in REFUSED.items() for options, *message in rows],
)
def test_refused(folder, command, options, message):
    before, runs = snapshot(folder.parent), sorted((folder / "runs").iterdir())
    train(folder, *COMMANDS[command], *options.split()).refused(*message)
    assert snapshot(folder.parent) == before
    assert sorted((folder / "runs").iterdir()) == runs  # nor an empty folder
    assert [path.name for path in folder.parent.iterdir()] == ["here"]


def whole_traces() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"


def test_the_whole_trace_on_request(tmp_path):
    ended = train(tmp_path, "method.los=l1", before=whole_traces)
    assert (ended.code, ended.errors) == (1, [])
    assert "Traceback" in ended.err


def test_a_data_set_derived_from_another_is_found_by_its_teacher(tmp_path):
    """With an evaluation of its own, which its data config overrides."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my_own.yaml").write_text(
        "defaults: [image_folder, {override /evaluation@_global_.evaluation: pixels}, _self_]\npath: mine\nresolution: 16"
    )
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "my_own.yaml").write_text(
        "defaults: [digits, _self_]\nweights: null\nnetwork: {label_dropout: 0, attn_resolutions: []}"
    )
    message = "no mine16 images: neither data/mine16 nor mine exists"
    evaluate(tmp_path, f"--config-dir={tmp_path}", "teacher=my_own").refused(message)
    train(tmp_path, f"hydra.searchpath=[file://{tmp_path}]", "data=my_own", "method=pretrain").refused(message)


def one_picture(folder):
    """Too few for a covariance."""
    folder_of(folder / "pictures", {"0.png": encoded(pattern(20, 20), "PNG")})


def runs_is_a_file(folder):
    (folder / "runs").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "command", "message"),
    [
        (
            runs_is_a_file,
            PRETRAIN,
            ["runs/run can't be made (Not a directory)", "move away what is in its place", "choose another name=..."],
        ),
        (
            one_picture,
            (*PICTURES, "callbacks.metrics=null"),  # which would find it too
            ["fid compares with 2 real images at least, and the data set has 1", "evaluation=none"],
        ),
    ],
)
def test_refused_once_there_is_a_folder(tmp_path, prepare, command, message):
    prepare(tmp_path)
    before = snapshot(tmp_path)
    train(tmp_path, *command).refused(*message)
    assert before.items() <= snapshot(tmp_path).items()
    assert not list((tmp_path / RUN).rglob("*.ckpt*"))


# -- files ------------------------------------------------------------------------------------------------------------


def last_bit(path: Path) -> None:
    """Of the data of a shard, which its hash follows."""
    data = bytearray(path.read_bytes())
    data[-33] ^= 1
    path.write_bytes(data)


def checkpoint(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = read_checkpoint(path)
        change(content)
        torch.save(content, path)

    return damage


def of_another_method(content: dict) -> None:
    content["run"]["method"] = "sfd"


def of_integers(content: dict) -> None:
    """Which torch would take for weights without a word."""
    weights = content["state_dict"]
    weights |= {name: (100 * value).to(torch.int8) for name, value in weights.items() if value.ndim > 1}


def array(index, value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = np.load(path)
        values[index] = value
        np.save(path, values)

    return damage


def statistics(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with np.load(path) as file:
            content = dict(file)
        np.savez(path, **{**content, name: change(content[name])})

    return damage


@pytest.fixture(scope="module")
def unfinished(finished, tmp_path_factory):
    folder = copied(finished, tmp_path_factory.mktemp("unfinished"))
    (folder / RUN / "metrics.json").unlink()
    return folder


LAST = "runs/run/checkpoints/last.ckpt"
SHARD = "data/trajectories/*/shard-00000-first-64.npy"
# fmt: off
DAMAGED = [
    (LAST, checkpoint(of_another_method), STUDENT,
     ["of another method (sfd, and this run's is", "put the run's own last.ckpt back"]),
    (LAST, checkpoint(of_integers), STUDENT, ["does not fit this DenoisingStudent: of another kind", "int8"]),
    ("data/digits/images.npy", array(..., 7), NEW,
     ["is damaged, its SHA-256 is not meta.json's", "delete the folder data/digits and run again"]),
    (SHARD, last_bit, NEW, ["its data do not have the recorded SHA-256: delete this file and run again"]),
    ("data/statistics/*.npz", statistics("identity", lambda _: np.array("A, B")), NEW, ["by another extractor; delete it"]),
]
# fmt: on


@pytest.mark.parametrize(("path", "damage", "command", "message"), DAMAGED)
def test_damaged_files(unfinished, path, damage, command, message):
    """The file is named, and it and everything else stay as they were."""
    (path,) = unfinished.glob(path)
    intact = path.read_bytes()
    try:
        damage(path)
        before = snapshot(unfinished)
        train(unfinished, *command).refused(str(path.relative_to(unfinished)), *message)
        assert before.items() <= snapshot(unfinished).items()
        assert not list((unfinished / "runs").rglob("metrics.json"))
    finally:
        path.write_bytes(intact)
        shutil.rmtree(unfinished / "runs/new", ignore_errors=True)


def test_a_foreign_runs_config_runs_nothing(finished, tmp_path):
    copied(finished, tmp_path)
    config = OmegaConf.load(tmp_path / RUN / "config.yaml")
    node = {"_target_": "shutil.copy", "src": "runs/run/config.yaml", "dst": "copied"}
    OmegaConf.update(config, "method.teacher.network", node, merge=False)
    OmegaConf.save(config, tmp_path / RUN / "config.yaml")
    before = snapshot(tmp_path)
    evaluate(tmp_path, f"run={RUN}", "device=cpu").refused("_target_=shutil.copy", "is not built")
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


@contextmanager
def on_a_full_disk(original, path, **options):
    with original(path, **options) as temporary:
        temporary.symlink_to("/dev/full")
        yield temporary


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one(finished, tmp_path):
    with_data(finished, tmp_path)
    train(tmp_path, *STUDENT, before=kill_at(STEP, 8)).killed()
    last = tmp_path / LAST
    before = last.read_bytes()
    message = "cannot write the checkpoint", "No space left", "the previous one is intact", "Make room and run again"
    full = partial(in_call, "callbacks.checkpoint:atomic_write", 1, on_a_full_disk)
    train(tmp_path, *STUDENT, before=full).refused(LAST, *message)
    assert last.read_bytes() == before
    train(tmp_path, *STUDENT).ok()
    assert_same_run(tmp_path / RUN, finished / RUN)


# -- a loss that is no number -----------------------------------------------------------------------------------------


def not_a_number(original, *args):
    return original(*args) * float("nan")


def test_nan_stops_and_the_last_good_checkpoint_stays(finished, tmp_path):
    with_data(finished, tmp_path)
    ended = train(
        tmp_path, *STUDENT, before=partial(in_call, "lightning_modules:DenoisingStudent.loss", 8, not_a_number)
    )
    good = f"The last good checkpoint is {LAST}"
    ended.refused("the loss became NaN within steps 7 to 8", good, "Try a lower method.lr", "new run name")
    left = read_checkpoint(tmp_path / LAST)
    assert left["global_step"] == 6
    assert all(v.isfinite().all() for v in leaves(left).values() if isinstance(v, torch.Tensor))
    assert not (tmp_path / RUN / "metrics.json").exists()
    train(tmp_path, *STUDENT).ok()  # this time without: it goes on from there
    assert_same_run(tmp_path / RUN, finished / RUN)


def test_a_learning_rate_that_explodes(finished, tmp_path):
    with_data(finished, tmp_path)
    train(tmp_path, *PRETRAIN, "method.lr=1e30").refused("steps 1 to 3", "lower method.lr")
    assert not list((tmp_path / RUN).rglob("*.ckpt*"))

"""Bad input and broken files: one clear line that names the thing and the way out, exit code 1, and nothing is touched.

Here are messages that only a whole command gives, and a sample of the others, which the tests of their modules have.
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
    TINY,
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
from flow_runs import write_run
from omegaconf import OmegaConf
from picture_files import encoded, folder_of, pattern
from safetensors.torch import load_file, save_file

STEP = "lightning_modules:DenoisingStudent.training_step"
NEW = (*(option for option in STUDENT if option != "name=run"), "name=new")

# -- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Somebody's own config.yaml, pictures, and runs that may stand in method.teachers, each with one thing that is odd."""
    folder = tmp_path_factory.mktemp("misuse") / "here"
    for place in ("conf", "runs/foreign", "runs/empty"):
        (folder / place).mkdir(parents=True)
        (folder / place / "config.yaml").write_text("" if place.endswith("empty") else "defaults: [data: digits]\n")
    for name, count in (("pictures", 12), ("one", 1)):
        folder_of(folder / name, {f"{i}.png": encoded(pattern(20, 20, shift=i), "PNG") for i in range(count)})
    write_run(folder / "runs/plain")
    write_run(folder / "runs/half", finished=False)
    write_run(folder / "runs/large", resolution=16, attn_resolutions=[8])
    write_run(folder / "runs/unlabelled", conditional=False)
    write_run(folder / "runs/cut")
    (folder / "runs/cut/student.safetensors").write_bytes(b"cut short")
    write_run(folder / "runs/misfit")
    write_run(folder / "runs/wide", model_channels=16)
    for name in ("student.safetensors", "student.json"):
        shutil.copy(folder / "runs/wide" / name, folder / "runs/misfit" / name)
    return folder


FLOW = ("name=new", "trainer.accelerator=cpu", "method=bezier")
PICTURES = (
    *(option for option in PRETRAIN if not option.startswith("evaluation.")),
    *("data=image_folder", "data.path=pictures", "data.resolution=16", "evaluation=pixels"),
    *("teacher.network.channel_mult=[1,2]", "teacher.network.attn_resolutions=[]"),
)
COMMANDS = {
    "typed": (),
    "student": NEW,
    "pretrain": PRETRAIN,
    "pictures": PICTURES,
    "disback": (*TINY, "method=disback"),
    "teachers": FLOW,
    "curve": (*FLOW, "method.teachers=[runs/plain,runs/plain]"),
}
BELOW_RUNS = "below runs/, not empty, without .."
BELOW_DATA = "must name one folder below data/"
NEITHER = "is neither a file in conf/teacher nor a run folder"
NO_PICTURES = ("evaluation=pixels needs no weights", "evaluation=none trains without a measurement")
# fmt: off
REFUSED = {
    # What conf/ does not have: the nearest that it has.
    "typed": [
        ("method.los=l1", "no option method.los; did you mean method.loss?"),
        ("trainer.devces=2", "no option trainer.devces; did you mean trainer.devices?", "+trainer.devces="),
        ("lr=1", "no option lr; did you mean method.lr?"),
        ("methd=sfd", "no option methd; did you mean method"),
        ("~method.parrs", "no option method.parrs; did you mean method.pairs?"),
        ("zzz=1", "no option zzz; --cfg job shows all options"),
        ("-m method.los=l1,l2", "error: sweep: ", "did you mean method.loss?"),
        ("method=denoising_studnet", "method=denoising_studnet is not among conf/method; did you mean denoising_student?"),
        ("logger=none", "choose logger=NAME: csv, default, wandb, wandb_offline"),
        ("-m data=digist,digits", "error: sweep: ", "did you mean digits?"),
        ("recipe=sfd_digitz", "recipe=sfd_digitz is not among conf/recipe; did you mean sfd_digits"),  # Hydra passes over it
        ("teacher=none method=pretrain", "method=pretrain needs a teacher, or the network of one", "teacher=NAME"),
        ("~teacher", "needs a teacher", "teacher=NAME"),
        ("data=null", "data can't be left out", "digits"),
        ("logger=null", "logger can't be left out; choose logger=NAME: csv, default"),
        ("~callbacks", "callbacks is missing: train.py needs it"),
        ("recipe=null", "say ~recipe to leave it out"),
        ("data", "'data' can't be read", "say KEY=VALUE"),
        ("method.loss=[a", "'method.loss=[a' can't be read"),
        ("method.lr=1,2", "method.lr=1,2", "add --multirun"),
        ("--config-dir=nowhere", "nowhere' not found"),
        ("-m name=a seed=0,1", "two jobs would have the folder", "lack seed", "name=NAME-${seed}"),
        ("sweep=wandb", "sweep=wandb is for W&B: say `wandb sweep conf/sweep/wandb.yaml`"),
        # Sizes that fit into no memory, before anything is allocated.
        ("method.pairs=100000000000000", "method.pairs=100000000000000 (lower it)", "1.6e+06 GB of memory"),
        ("batch_size=100000000000", "batch_size=100000000000 (lower it)", "5.12e+04 GB of memory"),
        ("teacher.steps=100000000000", "100000000000 solver steps of teacher digits (lower them)", "GB of memory"),
        ("method=progressive method.start_steps=1099511627776", "1099511627776 solver steps of teacher digits", "GB"),
        ("method=progressive callbacks.metrics.nfe=[1,2]", "metrics.nfe=[1, 2]: steps=2: the student takes 1, and no other"),
        ("method=disback method.nodes=1000000000000", "method.nodes=1000000000000", "take fewer nodes"),
        ("method.pairs=1e14", "pairs"),
    ],
    "student": [
        ("seed=4294967296 plan=true", "seed=4294967296 is too large", "from 0 to 4294967295"),
        ("method.loss=l9 plan=true", "method.loss='l9' is unknown; choose one of l1, l2, huber"),
        ("method.loss=l9", "method.loss='l9' is unknown; choose one of l1, l2, huber"),
        ("trainer.validate_every_n_steps=0", "trainer.validate_every_n_steps must be an integer of at least 1, got 0"),
        ("trainer.accelerator=abacus", "accelerator='abacus'", "cpu"),
        ("method.held_out=15 trainer.devices=2", "method.held_out=15 can't be shared by the 2 processes"),
        ("callbacks.requeue.every_n_steps=0", "Requeue: every_n_steps must be at least 1, got 0"),
        # What does not fit together, which would show only after training.
        ("teacher.conditional=false plan=true", "num_classes in use=0", "digits 10", "choose a teacher that fits the data"),
        ("data.resolution=16 teacher.network.resolution=8", "resolution=8", "digits 16"),
        ("evaluation=points", "the points extractor reads uint8 images (N, 2, 1, 1), got torch.uint8 (1, 1, 8, 8)"),
        ("teacher.weights=nothing.safetensors", "no weights at", "nothing.safetensors", "method=pretrain"),
        ("teacher.weights=pretrained/digits_classifier.safetensors", "does not fit this SongUNet", "missing: "),
        ("teacher=none teacher.weights=a.safetensors", "no option teacher.weights without a teacher: say teacher=NAME"),
    ],
    "pretrain": [
        # Names that become paths.
        ("name=../../outside", "name='../../outside' must name a folder", BELOW_RUNS),
        ("name=a/../../conf", "name='a/../../conf' must name a folder", BELOW_RUNS),
        ("name=/tmp/elsewhere", "name='/tmp/elsewhere' must name a folder", BELOW_RUNS),
        ("name=", "name='' must name a folder", BELOW_RUNS),
        ("name=" + 256 * "a", "at most 255 long"),
        ("name=2024", "name=2024: give text"),
        ("name=foreign", "runs/foreign/config.yaml is not the config of a run", "restore or remove it"),
        ("name=empty", "runs/empty/config.yaml is not the config of a run (it is empty)"),
        ("folder=elsewhere", "folder is not an option: name=NAME makes it runs/NAME"),
        ("data.name=../../x", "data.name='../../x'", BELOW_DATA),
        ("teacher.name=a/b", "teacher.name='a/b'", BELOW_DATA),
        # The training would be lost, or something else than a run would be made.
        ("callbacks.checkpoints=null", "callbacks.checkpoints=null would lose the training", "put it back"),
        ("recipe=sfd_cifar10", "recipe=sfd_cifar10 is for another method: method.steps is unknown to Pretrain"),
        ("teacher.schedule.rho=0", "rho must be positive, got 0"),
        ("method._target_=shutil.copy", "method._target_=shutil.copy is not built"),
    ],
    # Before pictures are packed.
    "pictures": [
        ("evaluation.metrics=[]", "evaluation.metrics must be a list", "got []", *NO_PICTURES),
        ("evaluation.extractor=null", "evaluation.extractor=null", *NO_PICTURES),
        ("evaluation.num_samples=1000000000000", "evaluation.num_samples=1000000000000 in blocks=3", "lower them"),
        ("evaluation.training.num_samples=5", "callbacks.metrics.num_samples must be a whole number of at least 10"),
        ("evaluation=digits", "the digits extractor reads uint8 images (N, 1, 8, 8)", *NO_PICTURES),
    ],
    "disback": [
        ("method.sigma_init=100", "method.sigma_init=100", "0.002 to 80"),
        ("method.nodes=9 method.degradation.steps=8", "method.nodes=9 do not fit", "method.degradation.steps=8"),
        ("method.labels=mine", "method.labels must be one of uniform, data"),
        ("method.gan={generator:1}", "method.gan.fake is missing: method.gan needs it"),
    ],
    "teachers": [
        ("method.teachers=[digits_rf1,digits_rf9]", f"method.teachers: digits_rf9 {NEITHER}"),
        ("method.teachers=digits_rf1", "method.teachers=digits_rf1 must be a list"),
        ("method.teachers=[]", "method.teachers must name at least one teacher"),
        ("method.teachers=[runs/half]", "runs/half is no teacher yet, for it has no student.safetensors; finish that run first"),
        ("method.teachers=[runs/cut]", "runs/cut/student.safetensors has SHA-256 "),
        ("method.teachers=[runs/misfit]", "runs/misfit/student.safetensors does not fit this SongUNet"),
        ("method.teachers=[runs/plain,runs/large]", "plain has resolution=8, large 16", "must agree in size and classes"),
        ("method.teachers=[runs/unlabelled]", "num_classes in use=0, the data digits 10"),
        ("method=reflow teacher.weights=nothing.safetensors", "no weights at", "method=rectified_flow"),
        ("method=bezier data=cifar10", "method.teachers", "no weights at", "weights/cifar10-rf1.safetensors"),
    ],
    "curve": [
        ("method.order=0", "method.order must be an integer of at least 1, got 0"),
        ("method.slot=line", "method.slot must be one of endpoint, trajectory, linear, got 'line'"),
        ("method.order=3 method.slot=[endpoint]", "method.slot=['endpoint']", "the 2 inner control points of method.order=3"),
        ("method.weights=[[1,0],[0.5,0.6]]", "method.weights", "control point 2 are [0.5, 0.6]", "sum to 1"),
        ("method.weights=[[1,0]]", "method.weights=[[1, 0]] must be 2 rows (method.order) of 2 numbers"),
        ("method.order=12 method.slot=trajectory", "teacher plain has too few steps (10) to pass through the noise levels"),
        ("method.slot=trajectory method.dtype=uint8", "dtype=uint8 holds end points alone", "float16 or float32"),
        ("method.loss=lpips", "LPIPS is for RGB images", "this data has 1x8x8", "choose another method.loss"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("teacher=digist", "teacher=digist is not among conf/teacher; did you mean digits"),
        ("num_sample=3", "no option num_sample; did you mean num_samples"),
        ("teacher=digits seed=true", "error: evaluate: seed=true: give a whole number"),
        ("teacher=digits device=0", "device=0: give text"),
        ("teacher=digits +teacher.foo=1", "teacher.foo is unknown: Teacher takes name, "),
    ],
)
def test_refused_by_evaluate(tmp_path, options, message):
    evaluate(tmp_path, *options.split()).refused(message)
    assert not snapshot(tmp_path)


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


def runs_takes_nothing(folder):
    """As a read-only disk, for root too."""
    (folder / "runs").symlink_to("/proc/sys")


def its_checkpoints_are_a_file(folder):
    (folder / RUN).mkdir(parents=True)
    (folder / RUN / "checkpoints").write_text("mine")


def its_config_is_a_folder(folder):
    (folder / RUN / "config.yaml").mkdir(parents=True)


ELSEWHERE = ("move away what is in its place", "choose another name=...")


@pytest.mark.parametrize(
    ("prepare", "command", "message"),
    [
        (runs_is_a_file, PRETRAIN, ["the folder runs/run can't be made (Not a directory)", *ELSEWHERE]),
        (runs_takes_nothing, PRETRAIN, ["the folder runs/run can't be made (No such file or directory)", *ELSEWHERE]),
        (its_config_is_a_folder, PRETRAIN, ["cannot write runs/run/config.yaml: it is a folder"]),
        (its_checkpoints_are_a_file, PRETRAIN, ["cannot write runs/run/checkpoints/last.ckpt: Not a directory"]),
        (Path.exists, (*TINY, "method=disback", "callbacks.clock=null"), ["put callbacks.clock back"]),
        (
            one_picture,
            PICTURES,
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


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def last_bit(path: Path) -> None:
    """Of the data of a shard, which its hash follows."""
    data = bytearray(path.read_bytes())
    data[-33] ^= 1
    path.write_bytes(data)


def of_another_shape(path: Path) -> None:
    state = load_file(path)
    name = max(state, key=lambda key: state[key].numel())
    save_file(state | {name: state[name][:-1].clone()}, path)


def too_deep(path: Path) -> None:
    path.write_text("[" * 200_000)


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


def of_integer_averages(content: dict) -> None:
    for average in content["callbacks"]["EMA"]["averages"].values():
        average |= {name: (100 * value).to(torch.int8) for name, value in average.items() if value.ndim > 1}


def without_optimiser(content: dict) -> None:
    del content["optimizer_states"]


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
BEST = "runs/run/checkpoints/best.ckpt"
IMAGES = "delete the folder data/digits and run again"
SHARD = "trajectories/*/shard-00000-first-64.npy"
WEIGHTS = "runs/run/student.safetensors"
OWN = "put the run's own last.ckpt back"
# fmt: off
DAMAGED = [
    (LAST, truncated, STUDENT, ["damaged or cut short", "put an older copy back, or remove last.ckpt"]),
    (LAST, checkpoint(of_another_method), STUDENT, ["of another method (sfd, and this run's is", OWN]),
    (LAST, checkpoint(of_integers), STUDENT, ["does not fit this DenoisingStudent: of another kind", "int8"]),
    (BEST, checkpoint(of_integer_averages), STUDENT, ["does not fit this Denoiser: of another kind", "int8"]),
    (LAST, checkpoint(without_optimiser), STUDENT, ["can't be resumed, it lacks optimizer_states"]),
    (WEIGHTS, of_another_shape, (*NEW, f"teacher.weights={WEIGHTS}"), ["is not that of"]),
    ("data/digits/images.npy", truncated, NEW, [IMAGES]),
    ("data/digits/images.npy", array(..., 7), NEW, ["is damaged, its SHA-256 is not meta.json's", IMAGES]),
    ("data/digits/images.npy", array(..., 7), (*NEW, "data.verify=true"), ["is damaged, its SHA-256 is not meta.json's"]),
    ("data/digits/labels.npy", array(5, 10), NEW, ["is damaged, labels 0 to 10 of 10 classes", IMAGES]),
    ("data/digits/meta.json", too_deep, NEW, ["is damaged or of another version", IMAGES]),
    (f"data/{SHARD}", last_bit, NEW, ["its data do not have the recorded SHA-256: delete this file and run again"]),
    ("data/statistics/*.npz", truncated, NEW, ["data/statistics/"]),
    ("data/statistics/*.npz", statistics("sigma", lambda sigma: 1.5 * sigma), NEW, ["its numbers have changed"]),
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


@pytest.mark.parametrize("part", ["method", "data", "evaluation.extractor", "method.teacher.network"])
def test_a_foreign_runs_config_runs_nothing(finished, tmp_path, part):
    copied(finished, tmp_path)
    config = OmegaConf.load(tmp_path / RUN / "config.yaml")
    node = {"_target_": "shutil.copy", "src": "runs/run/config.yaml", "dst": "copied"}
    OmegaConf.update(config, part, node, merge=False, force_add=True)
    if part == "method":
        config.method.name = "denoising_student"
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

"""Progressive distillation, SFD and B-DENSE from the command line: kills, two processes, several numbers of steps, misuse."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from end_to_end_tools import (
    TINY,
    assert_same_run,
    die,
    evaluate,
    in_call,
    leaves,
    read_checkpoint,
    read_csv,
    read_json,
    snapshot,
    train,
    with_data,
)
from matplotlib.image import imread
from safetensors.torch import load_file

from stillhouse.checkpoints import save_weights
from stillhouse.networks import SongUNet

OPTIONS = tuple(o for o in TINY if not o.startswith(("name=", "teacher.weights=")))
METHODS = {
    # In 13 steps: rounds of 4, 2 and 1 steps that end after training steps 2, 7 and 13.
    "progressive": ("method=progressive", "method.start_steps=8", "method.lr=2e-5"),
    "dense_progressive": ("method=b_dense", "host=progressive", "method.start_steps=8", "method.lr=2e-5"),
    "sfd": ("method=sfd", "method.lr=2e-5"),
    "sfd_v": ("method=sfd", "method.steps=[1,2,3]", "method.lr=2e-5"),
    "dense_sfd": ("method=b_dense", "method.steps=[3,4]", "method.lr=2e-5", "method.branch_fade=0.7"),
}
PROGRESSIVE = "lightning_modules.progressive:ProgressiveDistillation"
SFD = "lightning_modules.sfd:SFD"
TEACHER = ("teacher=digits", "teacher.network.model_channels=8", "teacher.steps=2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The option of a teacher whose random weights, none of them zero, every process reads from one file."""
    generator = torch.Generator().manual_seed(0)
    network = SongUNet(
        8, 1, 1, num_classes=10, model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4]
    )
    state = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(path, state, {})
    return f"teacher.weights={path}"


@pytest.fixture(scope="module")
def options(teacher):
    """name of a run -> what is typed behind train.py for it."""
    return {name: (f"name={name}", *OPTIONS, teacher, *chosen) for name, chosen in METHODS.items()}


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A folder with a complete run of every method."""
    folder = tmp_path_factory.mktemp("finished")
    for chosen in options.values():
        train(folder, *chosen).ok()
    return folder


def last(folder, name):
    return folder / "runs" / name / "checkpoints" / "last.ckpt"


def kept(folder, name):
    return {path.name: path for path in sorted((folder / "runs" / name / "rounds").glob("*.safetensors"))}


# -- a finished run ---------------------------------------------------------------------------------------------------


def test_what_a_run_of_progressive_distillation_leaves(finished):
    for name in ("progressive", "dense_progressive"):
        folder = finished / "runs" / name
        assert {"samples.png", "curves.png", "metrics.json"} <= {path.name for path in folder.iterdir()}
        rows = read_csv(folder / "metrics.csv")
        assert [float(row["progress/steps"]) for row in rows] == [4.0] * 2 + [2.0] * 5 + [1.0] * 6
        assert list(kept(finished, name)) == ["1.safetensors", "2.safetensors", "4.safetensors"]
        assert kept(finished, name)["1.safetensors"].read_bytes() == (folder / "student.safetensors").read_bytes()
        (student,) = (r for r in read_json(folder / "metrics.json") if r["subject"] == "student")
        assert (student["nfe"], student["fingerprint"]["weights"]) == (1, "raw")


def test_what_runs_of_sfd_leave(finished):
    for name, steps in {"sfd": 2, "sfd_v": 3, "dense_sfd": 4}.items():
        folder = finished / "runs" / name
        assert {"samples.png", "curves.png", "metrics.json"} <= {path.name for path in folder.iterdir()}
        (student,) = (r for r in read_json(folder / "metrics.json") if r["subject"] == "student")
        assert student["nfe"] == steps


def test_the_losses_of_all_branches_are_logged(finished):
    for name, branches in {"dense_progressive": 2, "dense_sfd": 4}.items():
        rows = read_csv(finished / "runs" / name / "metrics.csv")
        logged = [key for key in rows[0] if key.startswith("loss/branch")]
        assert logged == [f"loss/branch{k}" for k in range(1, branches + 1)]
        for row in rows:
            losses = [float(row[key]) for key in logged]
            assert min(losses) <= float(row["loss/student"]) <= max(losses)
        # The first branch of progressive distillation starts with what it is to learn.
        assert (float(rows[0]["loss/branch1"]) < 1e-12) == (name == "dense_progressive")
    rows = read_csv(finished / "runs/dense_sfd/metrics.csv")
    assert [row["loss/student"] == row["loss/branch4"] for row in rows] == [False] * 10 + [True] * 3  # faded away


# -- kills ------------------------------------------------------------------------------------------------------------


def killed(original, *args, **kwargs):
    die()


def killed_after(original, *args, **kwargs):
    original(*args, **kwargs)
    die()


def of_weights(source, target):
    return str(target).endswith(".safetensors")


def resumed(options, finished, folder, name, before, *more):
    """Kill a run by `before`, then let it end; returns the killed run's last checkpoint."""
    with_data(finished, folder)
    train(folder, *options[name], *more, before=before).killed()
    checkpoint = read_checkpoint(last(folder, name))
    train(folder, *options[name], *more).ok()
    assert_same_run(folder / "runs" / name, finished / "runs" / name)
    ours, theirs = kept(folder, name), kept(finished, name)
    assert {name: path.read_bytes() for name, path in ours.items()} == {n: p.read_bytes() for n, p in theirs.items()}
    return checkpoint


# Checkpoints are written after steps 3, 6, 9, 12 and 13, the students of the rounds after 2, 7 and 13.
@pytest.mark.parametrize(
    ("target", "number", "act", "when", "every", "step"),
    [
        pytest.param(
            f"{PROGRESSIVE}.training_step", 6, killed, None, 3, 3, id="inside a round", marks=pytest.mark.slow
        ),
        pytest.param("lightning_modules.progressive:save_weights", 2, killed_after, None, 3, 6, id="student kept"),
        pytest.param("os:replace", 2, killed, of_weights, 3, 6, id="half a student", marks=pytest.mark.slow),
        pytest.param(
            f"{PROGRESSIVE}.training_step", 8, killed, None, 7, 7, id="between rounds", marks=pytest.mark.slow
        ),
        pytest.param(
            "launch.run.final:save_records", 1, killed, None, 3, 13, id="final evaluation", marks=pytest.mark.slow
        ),
    ],
)
def test_progressive_distillation_is_killed(options, finished, tmp_path, target, number, act, when, every, step):
    before = partial(in_call, target, number, act, when)
    interval = f"callbacks.checkpoints.every_n_steps={every}"
    checkpoint = resumed(options, finished, tmp_path, "progressive", before, interval)
    assert checkpoint["global_step"] == step


@pytest.mark.parametrize(("name", "number", "step"), [("sfd", 11, 9), ("sfd_v", 8, 6), ("dense_sfd", 5, 3)])
@pytest.mark.slow
def test_sfd_is_killed_on_a_trajectory(options, finished, tmp_path, name, number, step):
    before = partial(in_call, f"{SFD}.training_step", number, killed)
    checkpoint = resumed(options, finished, tmp_path, name, before)
    assert checkpoint["global_step"] == step
    on_the_way(checkpoint)


def on_the_way(checkpoint):
    under_way = checkpoint["under_way"]
    assert under_way["departure"] < checkpoint["global_step"] < under_way["departure"] + under_way["steps"]
    assert under_way["x"].shape == (16, 1, 8, 8)


@pytest.mark.slow
def test_b_dense_on_progressive_distillation_is_killed(options, finished, tmp_path):
    """In the second round, after its students' branches were spread again; and what there is can be measured."""
    name = "dense_progressive"
    with_data(finished, tmp_path)
    train(tmp_path, *options[name], before=partial(in_call, f"{PROGRESSIVE}.training_step", 5, killed)).killed()
    evaluate(tmp_path, f"run=runs/{name}", "device=cpu").ok()
    measured = read_json(tmp_path / f"runs/{name}/evaluation/metrics.json")
    assert [r["nfe"] for r in measured if r["subject"] == "student"] == [2]
    refused = evaluate(tmp_path, f"run=runs/{name}", "steps=1", "device=cpu")
    refused.refused("error: evaluate: ", f"steps=1: runs/{name} has students of 4 steps so far")
    train(tmp_path, *options[name]).ok()
    assert_same_run(tmp_path / "runs" / name, finished / "runs" / name)


# -- two processes ----------------------------------------------------------------------------------------------------


def assert_close(ours, theirs):
    """Equal to 1e-6, and to a training step of Adam where the gradient is little more than its rounding.

    So it is for some 15 of 20,000 numbers, most of them biases of the attention's keys, on which nothing depends.
    """
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[key] - value).abs().flatten() for key, value in theirs.items()])
    assert len(apart) > 20_000
    assert (apart > 1e-6).sum() < len(apart) / 500
    assert apart.max() < 2e-5


@pytest.mark.slow
def test_two_processes_that_are_killed_on_the_way_do_what_one_does(options, teacher, finished, tmp_path):
    """B-DENSE on SFD, when both have trajectories under way; test_methods_in_processes.py has all methods without a kill.

    A student that hides labels in training, as this teacher's network does in its own, would hide others in each process.
    """
    name = "dense_sfd"
    with_data(finished, tmp_path)
    two = (*options[name], "trainer.devices=2")
    train(tmp_path, *two, before=partial(in_call, f"{SFD}.training_step", 5, killed)).killed()
    on_the_way(read_checkpoint(last(tmp_path, name)))
    train(tmp_path, *two).ok()
    folders = [folder / "runs" / name for folder in (tmp_path, finished)]
    ours, theirs = (load_file(folder / "student.safetensors") for folder in folders)
    assert_close(ours, theirs)
    start = load_file(teacher.partition("=")[2])
    assert max((theirs[key] - value).abs().max() for key, value in start.items()) > 2e-5
    assert_close(*(read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"] for folder in folders))
    rows, expected = (read_csv(folder / "metrics.csv") for folder in folders)
    for row, other in zip(rows, expected, strict=True):
        for key in ("step", "nimg", "progress/steps", "progress/student_updates"):
            assert row.get(key) == other.get(key)


# -- several numbers of steps -----------------------------------------------------------------------------------------


def student_records(path):
    return {r["nfe"]: r for r in read_json(path) if r["subject"] == "student"}


@pytest.mark.parametrize(("name", "counts"), [("progressive", [1, 2, 4]), ("sfd_v", [1, 2, 3])])
def test_quality_against_the_number_of_steps(finished, name, counts):
    folder = finished / "runs" / name
    ended = evaluate(finished, f"run=runs/{name}", f"steps={counts}", "device=cpu").ok()
    assert [len(re.findall(rf"{name} +student \(raw\) +{count} ", ended.out)) for count in counts] == [1, 1, 1]
    found = student_records(folder / "evaluation/metrics.json")
    assert list(found) == counts
    (final,) = student_records(folder / "metrics.json").values()
    # To the last bit: the other students have left no trace. A round's student, kept when it was done, has no step.
    assert found[final["nfe"]] | {"training": None} == final | {"training": None}
    assert len({tuple(r["values"]) for r in found.values()}) == 3
    assert imread(folder / "evaluation/quality.png").shape[:2] == (600, 840)
    assert imread(folder / "evaluation/samples.png").shape[1] > 1.4 * imread(folder / "samples.png").shape[1]


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("progressive", "3", ["steps=3: runs/progressive has students of 4, 2, 1 steps so far"]),
        ("progressive", "[8,3]", ["steps=8: runs/progressive has students of 4, 2, 1 steps so far"]),
        ("sfd_v", "4", ["steps=4: the student of runs/sfd_v was trained for 1, 2, 3", "method.steps=[...]"]),
        ("sfd", "1", ["steps=1: the student of runs/sfd was trained for 2;", "method.steps=[...]"]),
    ],
)
def test_other_numbers_of_steps_are_refused(finished, name, steps, message):
    before = snapshot(finished)
    evaluate(finished, f"run=runs/{name}", f"steps={steps}", "device=cpu").refused(*message)
    assert snapshot(finished) == before


# -- exported students ------------------------------------------------------------------------------------------------


def test_exported_students_are_plain_networks(finished, teacher):
    plain = {key: value.shape for key, value in load_file(teacher.partition("=")[2]).items()}
    for name in METHODS:
        state = load_file(finished / "runs" / name / "student.safetensors")
        assert {key: value.shape for key, value in state.items()} == plain
    card = json.loads((finished / "runs/progressive/rounds/2.json").read_text())
    assert (card["method"], card["steps"], card["round"], card["teacher"]) == ("progressive", 2, 2, "digits")


@pytest.mark.slow
def test_a_branched_student_is_measured_as_a_teacher(finished, tmp_path):
    with_data(finished, tmp_path)
    weights = f"teacher.weights={finished}/runs/dense_sfd/student.safetensors"
    evaluate(tmp_path, *TEACHER, weights, "num_samples=20", "blocks=2", "device=cpu").ok()
    assert {r["nfe"] for r in read_json(tmp_path / "runs/teacher-digits/metrics.json")} == {3, 0}


@pytest.mark.slow
def test_the_second_stage_of_sfd(finished, options, tmp_path):
    """One step, learned from the student for several."""
    with_data(finished, tmp_path)
    weights = f"teacher.weights={finished}/runs/sfd_v/student.safetensors"
    second = ("method.solver=euler", "method.solver_options=null", "method.substeps=3", "method.teacher_afs=true")
    train(tmp_path, *options["sfd"], "method.steps=1", *second, weights).ok()
    assert list(student_records(tmp_path / "runs/sfd/metrics.json")) == [1]
    assert len(read_csv(tmp_path / "runs/sfd/metrics.csv")) == 13


# -- debugging, and bfloat16 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["progressive", "sfd"])
@pytest.mark.slow
def test_debugging_in_bfloat16(finished, options, tmp_path, host):
    """Both hosts with their own settings: in ten steps there are four rounds."""
    with_data(finished, tmp_path)
    network = [o for o in options["sfd"] if o.startswith("teacher.")]
    chosen = ("name=debug", "method=b_dense", f"host={host}", "trainer=debug", "trainer.precision=bf16-mixed")
    train(tmp_path, *network, *chosen).ok()
    rows = read_csv(tmp_path / "runs/debug/metrics.csv")
    losses = torch.tensor([float(row["loss/student"]) for row in rows])
    assert len(losses) == 10
    assert losses.isfinite().all()
    # Only the networks compute in bfloat16.
    assert (losses != losses.bfloat16().float()).sum() > 5
    state = leaves(read_checkpoint(last(tmp_path, "debug")))
    assert {value.dtype for key, value in state.items() if "network." in key} == {torch.float32}
    if host == "progressive":
        assert list(dict.fromkeys(row["progress/steps"] for row in rows)) == ["8.0", "4.0", "2.0", "1.0"]
        assert float(rows[0]["loss/branch1"]) < 1e-12


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dense_sfd", "method.branches=3", ["method.branches=3 does not divide the 4 teacher steps"]),
        ("dense_progressive", "method.branches=4", ["method.branches=4 does not divide the 2 teacher steps"]),
        (
            "dense_sfd",
            "method.branch_weights=[1,2]",
            ["method.branch_weights=[1, 2] must be 4 numbers for method.branches=4"],
        ),
        ("progressive", "method.start_steps=12", ["method.start_steps=12", "method.factor=2", "method.end_steps=1"]),
        ("progressive", "method.weighting=edm", ["method.weighting must be one of truncated_snr", "got 'edm'"]),
        ("progressive", "method.kimg=0.03", ["method.kimg gives 2 training steps, too few for 3 rounds"]),
        ("progressive", "callbacks.ema={_target_:callbacks.EMA}", ["an average would mix", "callbacks.ema=null"]),
        ("sfd", "method.solver=dpm", ["method.solver='dpm' is unknown", "dpm_solver_pp"]),
        ("sfd", "method.solver=heun", ["method.solver_options={'order': 2", "solver 'heun'", "null: no options"]),
        ("sfd", "method.steps=[]", ["method.steps must be a number of steps, or a list of some"]),
        ("sfd", "method.steps=[2,0]", ["method.steps must be an integer of at least 1, got 0"]),
    ],
)
def test_misuse(finished, options, name, changes, message):
    before = snapshot(finished)
    train(finished, *options[name], "name=new", changes).refused("error: runs/new: ", *message)
    assert before.items() <= snapshot(finished).items()
    assert not list((finished / "runs/new").rglob("*.ckpt"))
    shutil.rmtree(finished / "runs/new", ignore_errors=True)


def test_other_branches(finished, options):
    before = snapshot(finished)
    changed = train(finished, *options["dense_sfd"], "method.branches=2")
    changed.refused("started with method.branches=4", "method.branches=2", "choose another name=")
    assert snapshot(finished) == before

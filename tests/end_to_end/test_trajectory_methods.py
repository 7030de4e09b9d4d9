"""Progressive distillation, SFD and their branches (B-DENSE) from the command line: kills, numbers of steps, students, misuse."""

import json
import re

import pytest
import torch
from end_to_end_tools import (
    TINY,
    Finished,
    evaluate,
    kill_at,
    leaves,
    random_teacher,
    read_checkpoint,
    read_csv,
    read_json,
    snapshot,
    train,
)
from matplotlib.image import imread
from safetensors.torch import load_file

OPTIONS = tuple(o for o in TINY if not o.startswith(("name=", "teacher.weights=")))
METHODS = {
    # In 13 steps: rounds of 4, 2 and 1 steps that end after training steps 2, 7 and 13.
    "progressive": ("method=progressive", "method.start_steps=8", "method.lr=2e-5"),
    "dense_progressive": ("method=b_dense", "host=progressive", "method.start_steps=8", "method.lr=2e-5"),
    "sfd": ("method=sfd", "method.lr=2e-5"),
    "sfd_v": ("method=sfd", "method.steps=[1,2,3]", "method.lr=2e-5"),
    "dense_sfd": ("method=b_dense", "method.steps=[3,4]", "method.lr=2e-5", "method.branch_fade=0.7"),
}
PROGRESSIVE = "lightning_modules.progressive:ProgressiveDistillation.training_step"
SFD = "lightning_modules.sfd:SFD.training_step"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def options(teacher):
    """name of a run -> what is typed behind train.py for it."""
    return {name: (f"name={name}", *OPTIONS, teacher, *chosen) for name, chosen in METHODS.items()}


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("finished"), options)


def kept(folder, name):
    return {path.name: path.read_bytes() for path in sorted((folder / "runs" / name / "rounds").glob("*.safetensors"))}


def student_records(path):
    return {r["nfe"]: r for r in read_json(path) if r["subject"] == "student"}


# -- a finished run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["progressive", pytest.param("dense_progressive", marks=pytest.mark.slow)])
def test_what_a_run_of_progressive_distillation_leaves(finished, teacher, name):
    folder = finished(name) / "runs" / name
    assert {"samples.png", "curves.png", "metrics.json"} <= {path.name for path in folder.iterdir()}
    assert [len(read_csv(folder / place / "metrics.csv")) for place in ("rounds/4", "rounds/2", "")] == [2, 5, 6]
    assert list(kept(finished(name), name)) == ["2.safetensors", "4.safetensors"]
    assert not list(folder.glob("rounds/*/checkpoints/*"))
    assert json.loads((folder / "preparation.json").read_text()).items() >= {"steps": 7, "images": 7 * 16}.items()
    ((nfe, student),) = student_records(folder / "metrics.json").items()
    assert (nfe, student["fingerprint"]["weights"]) == (1, "raw")
    card = json.loads((folder / "rounds/2.json").read_text())
    assert (card["steps"], card["round"], card["teacher"]) == (2, 2, "digits")
    check_export(folder, teacher)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("sfd_v", 3, marks=pytest.mark.slow),
        pytest.param("sfd", 2, marks=pytest.mark.slow),
        pytest.param("dense_sfd", 4, marks=pytest.mark.slow),
    ],
)
def test_what_a_run_of_sfd_leaves(finished, teacher, name, steps):
    folder = finished(name) / "runs" / name
    assert {"samples.png", "curves.png", "metrics.json"} <= {path.name for path in folder.iterdir()}
    assert list(student_records(folder / "metrics.json")) == [steps]
    check_export(folder, teacher)


def check_export(folder, teacher):
    """A plain network, whatever was trained."""
    state, plain = (load_file(path) for path in (folder / "student.safetensors", teacher.partition("=")[2]))
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in plain.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "branches"), [("dense_progressive", 2), ("dense_sfd", 4)])
def test_the_losses_of_all_branches_are_logged(finished, name, branches):
    first = "rounds/4" if name == "dense_progressive" else ""
    rows = read_csv(finished(name) / "runs" / name / first / "metrics.csv")
    logged = [key for key in rows[0] if key.startswith("loss/branch")]
    assert logged == [f"loss/branch{k}" for k in range(1, branches + 1)]
    for row in rows:
        losses = [float(row[key]) for key in logged]
        assert min(losses) <= float(row["loss/student"]) <= max(losses)
    # The first branch of progressive distillation starts with what it is to learn.
    assert (float(rows[0]["loss/branch1"]) < 1e-12) == (name == "dense_progressive")
    if name == "dense_sfd":
        assert [row["loss/student"] == row["loss/branch4"] for row in rows] == [False] * 10 + [True] * 3  # faded away


# -- kills ------------------------------------------------------------------------------------------------------------


def of_weights(source, target):
    return str(target).endswith(".safetensors")


# The rounds have 2, 5 and 6 training steps; checkpoints are written after every third and the last one of each.
@pytest.mark.parametrize(
    ("name", "before"),
    [
        pytest.param(
            "progressive", kill_at("lightning_modules.progressive:save_weights", 2, after=True), id="student kept"
        ),
        *(
            pytest.param(name, before, id=label, marks=pytest.mark.slow)
            for label, name, before in (
                ("inside a round", "progressive", kill_at(PROGRESSIVE, 6)),
                ("half a student", "progressive", kill_at("os:replace", 2, of_weights)),
                ("between rounds", "progressive", kill_at(PROGRESSIVE, 8)),
                ("final evaluation", "progressive", kill_at("launch.run.final:save_records", 1)),
                ("branches spread again", "dense_progressive", kill_at(PROGRESSIVE, 6)),
                ("several numbers of steps", "sfd_v", kill_at(SFD, 8)),
                ("branches along trajectories", "dense_sfd", kill_at(SFD, 5)),
            )
        ),
    ],
)
def test_a_killed_run_ends_as_one_left_alone(finished, tmp_path, name, before):
    finished.assert_resumes(tmp_path, name, before)
    assert kept(tmp_path, name) == kept(finished(name), name)


@pytest.mark.slow
def test_what_there_is_of_a_killed_run_can_be_measured(finished, options, tmp_path):
    """In the last round; before it there is nothing to measure, which is said."""
    finished.begin(tmp_path, "dense_progressive")
    train(tmp_path, *options["dense_progressive"], before=kill_at(PROGRESSIVE, 5)).killed()
    refused = evaluate(tmp_path, "run=runs/dense_progressive", "device=cpu")
    refused.refused("no checkpoint at runs/dense_progressive/checkpoints/last.ckpt")
    # The second round's 5 steps again, and 4 of the last one's.
    train(tmp_path, *options["dense_progressive"], before=kill_at(PROGRESSIVE, 10)).killed()
    evaluate(tmp_path, "run=runs/dense_progressive", "steps=[1,2,4]", "device=cpu").ok()
    assert list(student_records(tmp_path / "runs/dense_progressive/evaluation/metrics.json")) == [1, 2, 4]


# -- several numbers of steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts"), [("progressive", [1, 2, 4]), pytest.param("sfd_v", [1, 2, 3], marks=pytest.mark.slow)]
)
def test_quality_against_the_number_of_steps(finished, name, counts):
    folder = finished(name) / "runs" / name
    ended = evaluate(finished(name), f"run=runs/{name}", f"steps={counts}", "device=cpu").ok()
    assert [len(re.findall(rf"{name} +student \(raw\) +{count} ", ended.out)) for count in counts] == [1, 1, 1]
    found = student_records(folder / "evaluation/metrics.json")
    assert list(found) == counts
    (final,) = student_records(folder / "metrics.json").values()
    assert found[final["nfe"]] == final  # to the last bit: the other students have left no trace
    assert len({tuple(r["values"]) for r in found.values()}) == 3
    assert imread(folder / "evaluation/quality.png").shape[:2] == (600, 840)
    assert imread(folder / "evaluation/samples.png").shape[1] > 1.4 * imread(folder / "samples.png").shape[1]


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("progressive", "[8,3]", ["steps=8: runs/progressive has students of 4, 2, 1 steps"]),
        pytest.param(
            *("sfd_v", "4", ["steps=4: the student takes 3, 2, 1, and no other number (runs/sfd_v)"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_numbers_of_steps_are_refused(finished, name, steps, message):
    before = snapshot(finished(name))
    evaluate(finished(name), f"run=runs/{name}", f"steps={steps}", "device=cpu").refused(*message)
    assert snapshot(finished(name)) == before


# -- students as teachers, debugging, and bfloat16 --------------------------------------------------------------------


@pytest.mark.slow
def test_a_branched_student_is_measured_as_a_teacher(finished, tmp_path):
    finished.begin(tmp_path, "dense_sfd")
    weights = f"teacher.weights={finished('dense_sfd')}/runs/dense_sfd/student.safetensors"
    network = ("teacher=digits", "teacher.network.model_channels=8", "teacher.steps=2", weights)
    evaluate(tmp_path, *network, "num_samples=20", "blocks=2", "device=cpu").ok()
    assert {r["nfe"] for r in read_json(tmp_path / "runs/teacher-digits/metrics.json")} == {3, 0}


@pytest.mark.slow
def test_the_second_stage_of_sfd(finished, options, tmp_path):
    """One step, learned from the student for several."""
    finished.begin(tmp_path, "sfd_v")
    weights = f"teacher.weights={finished('sfd_v')}/runs/sfd_v/student.safetensors"
    second = ("method.solver=euler", "method.solver_options=null", "method.substeps=3", "method.teacher_afs=true")
    train(tmp_path, *options["sfd"], "method.steps=1", *second, weights).ok()
    assert list(student_records(tmp_path / "runs/sfd/metrics.json")) == [1]
    assert len(read_csv(tmp_path / "runs/sfd/metrics.csv")) == 13


@pytest.mark.slow
@pytest.mark.parametrize("host", ["progressive", "sfd"])
def test_debugging_in_bfloat16(finished, options, tmp_path, host):
    """Both hosts with their own settings: in ten steps there are four rounds."""
    finished.begin(tmp_path, "sfd")
    network = [o for o in options["sfd"] if o.startswith("teacher.")]
    chosen = ("name=debug", "method=b_dense", f"host={host}", "trainer=debug", "trainer.precision=bf16-mixed")
    train(tmp_path, *network, *chosen).ok()
    rows = read_csv(tmp_path / "runs/debug/metrics.csv")
    losses = torch.tensor([float(row["loss/student"]) for row in rows])
    assert len(losses) == (4 if host == "progressive" else 10)  # of the last round
    assert losses.isfinite().all()
    # Only the networks compute in bfloat16.
    assert (losses != losses.bfloat16().float()).sum() > len(losses) / 2
    state = leaves(read_checkpoint(tmp_path / "runs/debug/checkpoints/last.ckpt"))
    assert {value.dtype for key, value in state.items() if "network." in key} == {torch.float32}
    if host == "progressive":
        assert float(read_csv(tmp_path / "runs/debug/rounds/8/metrics.csv")[0]["loss/branch1"]) < 1e-12


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dense_sfd", "method.branches=3", ["method.branches=3 does not divide the 4 teacher steps"]),
        ("progressive", "method.start_steps=12", ["method.start_steps=12", "method.factor=2", "method.end_steps=1"]),
        ("progressive", "method.kimg=0.03", ["method.kimg gives 2 training steps, too few for 3 rounds"]),
        ("sfd", "method.solver=heun", ["method.solver_options={'order': 2", "solver 'heun'", "null: no options"]),
        ("sfd", "method.steps=[]", ["method.steps must be a number of steps, or a list of some"]),
    ],
)
def test_misuse(options, tmp_path, name, changes, message):
    train(tmp_path, *options[name], "name=new", changes).refused("error: runs/new: ", *message)
    assert not snapshot(tmp_path)


@pytest.mark.slow
def test_other_branches(finished, options):
    before = snapshot(finished("dense_sfd"))
    changed = train(finished("dense_sfd"), *options["dense_sfd"], "method.branches=2")
    changed.refused("started with method.branches=4", "method.branches=2", "choose another name=")
    assert snapshot(finished("dense_sfd")) == before

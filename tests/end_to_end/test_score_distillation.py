"""Diff-Instruct and DisBack from the command line: kills in either stage, two processes, shared paths, misuse."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from end_to_end_tools import (
    RUN,
    TINY,
    assert_identical,
    assert_same_run,
    die,
    in_call,
    read_checkpoint,
    read_csv,
    read_json,
    snapshot,
    train,
    with_data,
)

TINY_DISBACK = (
    *TINY,
    "method=disback",
    "method.nodes=2",
    "method.interval=2",
    "method.fake_updates=1",
    "method.fake_lr_factor=1",
    "method.degradation.steps=8",
    "method.lr=1e-3",
    "method.degradation.lr=1e-3",
)
STAGE_1 = "lightning_modules.components.degradation_recording:DegradationRecording.training_step"
STAGE_2 = "lightning_modules.diff_instruct:DiffInstruct.training_step"
PATH = Path("data/degradation")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights that every process reads from one file."""
    folder = tmp_path_factory.mktemp("teacher")
    train(folder, *TINY, "method=pretrain", "method.lr=1e-3").ok()
    return f"teacher.weights={folder / RUN / 'student.safetensors'}"


@pytest.fixture(scope="module")
def options(teacher):
    return (*(o for o in TINY_DISBACK if not o.startswith("teacher.weights")), teacher)


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, *options).ok()
    return folder


def killed(original, *args, **kwargs):
    die()


def nodes(folder):
    return {path.name: path.read_bytes() for path in (folder / PATH).rglob("*.safetensors")}


def test_the_run_leaves_its_path_its_cost_and_its_curves(uninterrupted):
    assert sorted(nodes(uninterrupted)) == ["node-000003.safetensors", "node-000008.safetensors"]
    cost = json.loads((uninterrupted / RUN / "preparation.json").read_text())
    assert (cost["steps"], cost["images"]) == (8, 128)
    rows = read_csv(uninterrupted / RUN / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 14)]
    assert rows[-1]["progress/student_updates"] == "6"
    # After updates 2, so from step 5 on, the target is the teacher.
    assert [float(row["score/node"]) for row in rows] == [1.0] * 4 + [2.0] * 9
    assert all(rows[-1][key] for key in ("loss/fake", "loss/mismatch", "score/lead", "generator/std"))
    assert len(read_csv(uninterrupted / RUN / "degradation" / "metrics.csv")) == 8
    state = read_checkpoint(uninterrupted / RUN / "checkpoints/last.ckpt")
    assert {key.partition(".")[0] for key in state["state_dict"]} == {"student", "fake"}
    assert len(state["optimizer_states"]) == 2
    subjects = {r["subject"] for r in read_json(uninterrupted / RUN / "metrics.json")}
    assert subjects == {"teacher", "student", "real"}


@pytest.mark.parametrize(
    ("target", "number", "said"),
    [
        pytest.param(
            STAGE_1, 5, ["runs/run/degradation goes on from step 3 of 8 (48 of 128 images)"], id="stage 1", marks=SLOW
        ),
        pytest.param(
            "lightning_modules.components.degradation_path:save_weights",
            2,
            ["runs/run/degradation goes on from step 6 of 8 (96 of 128 images)"],
            id="last node",
        ),
        pytest.param(STAGE_2, 1, [], id="between the stages", marks=SLOW),
        pytest.param(
            STAGE_2,
            8,
            ["runs/run goes on from step 6 of 13 (96 of 208 images)"],
            id="stage 2, after a switch",
            marks=SLOW,
        ),
    ],
)
def test_killed_in_either_stage(options, uninterrupted, tmp_path, target, number, said):
    with_data(uninterrupted, tmp_path, "degradation")
    train(tmp_path, *options, before=partial(in_call, target, number, killed)).killed()
    ended = train(tmp_path, *options).ok()
    assert [line for line in ended.out.splitlines() if "goes on from" in line] == said
    assert nodes(tmp_path) == nodes(uninterrupted)
    assert_same_run(tmp_path / RUN, uninterrupted / RUN)


@pytest.mark.slow
def test_another_seed_shares_the_path_and_other_settings_do_not(options, uninterrupted, tmp_path):
    with_data(uninterrupted, tmp_path)
    before = snapshot(tmp_path / PATH)
    refuse = partial(in_call, STAGE_1, 1, killed)
    train(tmp_path, *options, "seed=1", before=refuse).ok()
    assert snapshot(tmp_path / PATH) == before
    assert json.loads((tmp_path / RUN / "preparation.json").read_text())["steps"] == 8
    train(tmp_path, *options, "name=other", "method.sigma_init=80", before=refuse).killed()


@pytest.mark.slow
def test_a_run_killed_in_stage_1_keeps_its_config(options, tmp_path, uninterrupted):
    with_data(uninterrupted, tmp_path, "degradation")
    train(tmp_path, *options, before=partial(in_call, STAGE_1, 5, killed)).killed()
    train(tmp_path, *options, "method.degradation.lr=2e-3").refused("method.degradation.lr=0.001", "0.002")


@pytest.mark.slow
def test_no_nodes_is_diff_instruct(options, uninterrupted, tmp_path):
    """Weights, optimisers and averages, to the last bit."""
    with_data(uninterrupted, tmp_path)
    train(tmp_path, *options, "name=none", "method.nodes=0").ok()
    plain = [o for o in options if not re.match(r"method=|method\.(nodes|interval|degradation)", o)]
    train(tmp_path, *plain, "name=plain", "method=diff_instruct").ok()
    ours, theirs = (read_checkpoint(tmp_path / "runs" / n / "checkpoints/last.ckpt") for n in ("none", "plain"))
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_identical(ours[key], theirs[key])
    assert_identical(ours["callbacks"]["EMA"], theirs["callbacks"]["EMA"])


@pytest.mark.slow
def test_a_sweep_over_methods(options, uninterrupted, tmp_path):
    with_data(uninterrupted, tmp_path)
    shared = [o for o in options if not re.match(r"name=|method=|method\.(nodes|interval|degradation|fake)", o)]
    # Hydra looks for plain options in the default method; a choice of one is left to the jobs.
    sweep = ("method=diff_instruct,disback", "method.kimg=0.08", "method.fake_updates=choice(1)")
    train(tmp_path, "-m", *shared, *sweep).ok()
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if (path / "metrics.json").exists())
    assert len(names) == 2
    assert names[0].startswith("diff_instruct-digits-seed0")
    assert names[1].startswith("disback-digits-seed0")
    folders = [path for path in (tmp_path / PATH).iterdir() if len(list(path.glob("*.safetensors"))) == 3]
    assert len(folders) == 1  # the default path of three nodes


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("cut", ("node-000008.safetensors", "is damaged: delete the file and run again")),
        ("foreign", ("belongs to another degradation path", "move that folder away")),
    ],
)
@pytest.mark.slow
def test_a_bad_path_is_refused_and_left_as_it_is(options, uninterrupted, tmp_path, damage, parts):
    with_data(uninterrupted, tmp_path)
    (folder,) = (tmp_path / PATH).iterdir()
    file = folder / "node-000008.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        card = json.loads(file.with_suffix(".json").read_text())
        file.with_suffix(".json").write_text(json.dumps(card | {"generator": "0" * 64}))
    before = snapshot(tmp_path / PATH)
    train(tmp_path, *options).refused(*parts)
    assert snapshot(tmp_path / PATH) == before
    assert not (tmp_path / RUN / "checkpoints").exists()
    shutil.rmtree(folder)
    train(tmp_path, *options).ok()

"""Rectified flow, reflow, its distillation and Bezier distillation from the command line: kills, two processes."""

from functools import partial

import pytest
import torch
from end_to_end_tools import (
    TINY,
    assert_same_run,
    die,
    evaluate,
    in_call,
    read_checkpoint,
    read_csv,
    read_json,
    snapshot,
    train,
    with_data,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file

from launch.run.build import build
from launch.run.teachers import expand_teachers
from stillhouse.checkpoints import save_weights
from stillhouse.networks import SongUNet

pytestmark = pytest.mark.slow  # five methods, each killed; test_support.py trains all methods for a moment
COMMON = tuple(o for o in TINY if not o.startswith(("name=", "teacher.")))
# Hidden labels are drawn by each process for itself.
NETWORK = ("teacher.network.model_channels=8", "teacher.network.label_dropout=0", "teacher.steps=3", "method.lr=2e-5")
PAIRS = ("method.pairs=64", "method.held_out=16", "method.dtype=float32", "trainer.validate_every_n_steps=4")
TWO = "method.teachers=[runs/flow,runs/straight]"
# The first two are the others' teachers.
METHODS = {
    "flow": ("method=rectified_flow", "teacher.solver=euler", *NETWORK),
    "straight": ("method=reflow", *NETWORK, *PAIRS),
    "distilled": ("method=flow_distill", "teacher.solver=euler", *NETWORK, *PAIRS),
    "bezier": ("method=bezier", TWO, "method.weights=[[1,0],[0.3,0.7]]", "method.lr=2e-5", *PAIRS),
    # Two outputs, trajectories, moving weights.
    "joint": (
        "method=bezier",
        TWO,
        "method.order=3",
        "method.slot=[trajectory,linear]",
        "method.weights=[[1,0],[1,0],[0.5,0.5]]",
        "method.final_weights=[[0,1],[1,0],[0.1,0.9]]",
        "method.drift=0.5",
        "method.lr=2e-5",
        *PAIRS,
    ),
}
NFE = {"flow": 3, "straight": 5, "distilled": 1, "bezier": 1, "joint": 1}
STEP = {
    "flow": "lightning_modules:RectifiedFlow.training_step",
    "straight": "lightning_modules:Reflow.training_step",
    "distilled": "lightning_modules:FlowDistillation.training_step",
    "bezier": "lightning_modules:BezierDistillation.training_step",
    "joint": "lightning_modules:BezierDistillation.training_step",
}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """name of a run -> what is typed behind train.py for it. Both flows begin with weights of their own, none of them zero."""
    size = {"num_classes": 10, "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
    state = SongUNet(8, 1, 1, **size).state_dict()
    folder, weights = tmp_path_factory.mktemp("teacher"), {}
    for seed, name in enumerate(("flow", "straight", "distilled")):
        generator = torch.Generator().manual_seed(seed)
        drawn = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        save_weights(folder / f"{name}.safetensors", drawn, {})
        weights[name] = (f"teacher.weights={folder}/{name}.safetensors",)
    return {name: (f"name={name}", *COMMON, *own, *weights.get(name, ())) for name, own in METHODS.items()}


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A folder with a complete run of every method."""
    folder = tmp_path_factory.mktemp("finished")
    for chosen in options.values():
        train(folder, *chosen).ok()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A folder with its data, and with what the teachers' runs leave to others."""
    with_data(finished, tmp_path)
    for name in ("flow", "straight"):
        for file in ("config.yaml", "student.safetensors", "student.json"):
            path = tmp_path / "runs" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((finished / "runs" / name / file).read_bytes())
    return tmp_path


def student(folder, name):
    return load_file(folder / "runs" / name / "student.safetensors")


def start_of(chosen):
    """The file that a run begins with, None where it is its last teacher's."""
    return next((o.partition("=")[2] for o in chosen if o.startswith("teacher.weights=")), None)


def without(folder, name):
    """The folder without the run, which may be there as a teacher of others."""
    for path in (folder / "runs" / name).glob("*"):
        path.unlink()
    return folder


def killed(original, *args, **kwargs):
    die()


def test_what_runs_leave(finished):
    for name, nfe in NFE.items():
        folder = finished / "runs" / name
        assert {"samples.png", "metrics.json", "student.safetensors"} <= {path.name for path in folder.iterdir()}
        records = {record["subject"]: record for record in read_json(folder / "metrics.json")}
        assert records["student"]["nfe"] == nfe
        assert ("teacher" in records) == (name != "flow")
        assert (folder / "checkpoints/best.ckpt").exists() == (name != "flow")
        rows = read_csv(folder / "metrics.csv")
        assert len(rows) == 13
        assert any(row.get("heldout/loss") for row in rows) == (name != "flow")
    rows = read_csv(finished / "runs/joint/metrics.csv")
    for row in rows:
        both = float(row["loss/prediction"]) + 0.5 * float(row["loss/drift"])
        assert float(row["loss/student"]) == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_student_can_teach(finished, monkeypatch, name):
    """Exported plain also where it is trained with two outputs; as a teacher by its run's name only where it is a flow."""
    monkeypatch.chdir(finished)
    cfg = OmegaConf.create({"method": {"teachers": [f"runs/{name}"]}})
    if NFE[name] == 1:  # a flow no more: its weights can be read, but not sampled in many steps
        with pytest.raises(ValueError, match=f"the student of runs/{name} was distilled into 1 network evaluations"):
            expand_teachers(cfg)
        cfg.method.teachers = ["runs/flow"]
    expand_teachers(cfg)
    config = OmegaConf.merge(cfg.method.teachers[0], {"weights": f"runs/{name}/student.safetensors", "sha256": None})
    assert build(config).sample(torch.randn(4, 1, 8, 8), torch.arange(4)).isfinite().all()
    weights = read_checkpoint(finished / f"runs/{name}/checkpoints/last.ckpt")["state_dict"]
    channels = {len(value) for key, value in weights.items() if value.ndim == 4 and "heads" in key}
    assert channels == {2 if name == "joint" else 1}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_as_one_left_alone(options, finished, copy, name):
    without(copy, name)
    train(copy, *options[name], before=partial(in_call, STEP[name], 8, killed)).killed()
    assert read_checkpoint(copy / f"runs/{name}/checkpoints/last.ckpt")["global_step"] == 6
    train(copy, *options[name]).ok()
    assert_same_run(copy / "runs" / name, finished / "runs" / name)


def test_a_flow_is_measured_at_several_numbers_of_steps(finished, copy):
    """Euler steps but for its own number, that of its teacher's solver."""
    for path in (finished / "runs/straight").rglob("*.ckpt"):
        target = copy / "runs/straight/checkpoints" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    evaluate(copy, "run=runs/straight", "steps=[1,2,5]", "device=cpu").ok()
    records = read_json(copy / "runs/straight/evaluation/metrics.json")
    measured = {record["nfe"]: record["values"] for record in records if record["subject"] == "student"}
    assert list(measured) == [1, 2, 5]
    final = next(r for r in read_json(finished / "runs/straight/metrics.json") if r["subject"] == "student")
    assert measured[5] == final["values"]
    assert measured[1] != measured[2]


def test_bezier_students_take_one_step_alone(finished):
    before = snapshot(finished)
    refused = evaluate(finished, "run=runs/bezier", "steps=2", "device=cpu")
    refused.refused("error: evaluate: ", "steps=2: the student of runs/bezier takes 1, and no other number")
    assert snapshot(finished) == before


def test_students_as_teachers_by_their_weights(finished, copy):
    file = finished / "runs/joint/student.safetensors"
    chosen = ("teacher=digits_rf1", "teacher.network.model_channels=8", f"teacher.weights={file}", "num_samples=20")
    evaluate(copy, *chosen, "blocks=2", "steps=[1]", "device=cpu").ok()
    records = read_json(copy / "runs/teacher-digits_rf1/metrics.json")
    assert {record["subject"]: record["nfe"] for record in records} == {"teacher": 1, "real": 0}

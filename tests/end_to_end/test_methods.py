"""Flows, score distillation and consistency tuning from the command line: what runs leave, kills, stages, teachers.

test_trajectory_methods.py has progressive distillation and SFD; test_methods_in_processes.py all methods in two processes.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from end_to_end_tools import (
    ROOT,
    RUN,
    TINY,
    Finished,
    assert_identical,
    evaluate,
    kill_at,
    random_teacher,
    read_checkpoint,
    read_csv,
    read_json,
    snapshot,
    train,
)
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from launch.run.build import build
from launch.run.teachers import expand_teachers

PAIRS = ("method.pairs=64", "method.held_out=16", "method.dtype=float32", "trainer.validate_every_n_steps=4")
TWO_TEACHERS = "method.teachers=[runs/flow,runs/straight]"
FLOW = ("teacher.steps=3", "method.lr=2e-5")
SCORE = ("method.fake_updates=1", "method.fake_lr_factor=1", "method.lr=1e-3")
DEGRADATION = ("method.degradation.steps=8", "method.degradation.lr=1e-3")
# The first two are the others' teachers.
METHODS = {
    "flow": ("method=rectified_flow", "teacher.solver=euler", *FLOW),
    "straight": ("method=reflow", *FLOW, *PAIRS),
    "distilled": ("method=flow_distill", "teacher.solver=euler", *FLOW, *PAIRS),
    "bezier": ("method=bezier", TWO_TEACHERS, "method.weights=[[1,0],[0.3,0.7]]", "method.lr=2e-5", *PAIRS),
    # Two outputs, trajectories, moving weights.
    "joint": (
        *("method=bezier", TWO_TEACHERS, "method.order=3", "method.slot=[trajectory,linear]"),
        *("method.weights=[[1,0],[1,0],[0.5,0.5]]", "method.final_weights=[[0,1],[1,0],[0.1,0.9]]"),
        *("method.drift=0.5", "method.lr=2e-5", *PAIRS),
    ),
    "sid": ("method=sid", *SCORE),
    # The generator begins to learn in training step 4, the adversarial term joins it in step 10.
    "sida": ("method=sida", "method.generator_kimg=0.03", "method.gan_kimg=0.15", *SCORE),
    "sid_backtracking": ("method=sid", "method.nodes=2", "method.interval=2", *SCORE, *DEGRADATION),
    "dmd2": ("method=dmd2", "method.steps=2", "method.divergence=js", "method.ratio_ema=0.5", *SCORE),
    "moment_matching": ("method=moment_matching", "method.steps=2", *SCORE),
    "disback": ("method=disback", "method.nodes=2", "method.interval=2", *SCORE, *DEGRADATION),
    "consistency_distillation": ("method=consistency_distillation", "method.target_halflife=0.05", "method.lr=1e-3"),
    # Its third stage begins after training step 10; dropout masks are drawn.
    "ect": ("method=ect", "method.stage_kimg=0.08", "method.lr=1e-3", "teacher.network.dropout=0.2"),
    "tcm": ("method=tcm", "method.lr=1e-3", "teacher.solver=renoising", "teacher.network.dropout=0.2"),
    # The tangent grows until training step 10; dropout masks are drawn.
    "scm": ("method=scm", "method.tangent_warmup_kimg=0.16", "method.lr=1e-3", "teacher.network.dropout=0.2"),
    "mean_flow": ("method=mean_flow", "method.lr=1e-3", "teacher.network.dropout=0.2"),
    "imm": ("method=imm", "method.lr=1e-3", "teacher.network.dropout=0.2"),
    "cmt": ("method=cmt", "method.lr=1e-3", "batch_size=16", *PAIRS),
}
FLOWS = {"flow": 3, "straight": 5, "distilled": 1, "bezier": 1, "joint": 1}  # network evaluations of a sample
PATH = Path("data/degradation")
STAGE_1 = "lightning_modules.components.degradation_recording:DegradationRecording.training_step"
DISBACK = "lightning_modules:DisBack.training_step"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """name of a run -> what is typed behind train.py for it."""
    folder, typed = tmp_path_factory.mktemp("teachers"), {}
    for seed, (name, chosen) in enumerate(METHODS.items()):
        plain = [option for option in TINY if not option.startswith(("name=", "teacher.weights="))]
        if "method=bezier" in chosen:  # its teachers are runs
            plain = [option for option in plain if not option.startswith("teacher.")]
        else:  # hidden labels would be drawn by each process for itself
            plain += [random_teacher(folder / f"{name}.safetensors", seed), "teacher.network.label_dropout=0"]
        typed[name] = (f"name={name}", *plain, *chosen)
    return typed


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    teachers = {name: ("flow", "straight") for name, chosen in METHODS.items() if TWO_TEACHERS in chosen}
    return Finished(tmp_path_factory.mktemp("finished"), options, teachers)


def nodes(folder):
    """Of DisBack's path, and of that of SiD's run with one."""
    return {path.relative_to(folder): path.read_bytes() for path in (folder / PATH).rglob("*.safetensors")}


# -- kills ------------------------------------------------------------------------------------------------------------


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "target", "number", "goes_on"),
    [
        slow("disback", STAGE_1, 5, ("/degradation", 3, 8)),
        slow(
            "disback", "lightning_modules.components.degradation_path:save_weights", 2, ("/degradation", 6, 8)
        ),  # a node
        slow("disback", DISBACK, 1, None),  # between the stages
        slow("disback", DISBACK, 8, ("", 6, 13)),  # after a switch of targets
        slow("sid", "lightning_modules:SiD.training_step", 8, ("", 6, 13)),
        slow("sida", "lightning_modules:SiDA.training_step", 8, ("", 6, 13)),
        slow("sid_backtracking", "lightning_modules:SiD.training_step", 8, ("", 6, 13)),  # after a switch of targets
        slow("dmd2", "lightning_modules:DMD2.training_step", 8, ("", 6, 13)),
        slow("moment_matching", "lightning_modules:MomentMatching.training_step", 8, ("", 6, 13)),
        slow("flow", "lightning_modules:RectifiedFlow.training_step", 8, ("", 6, 13)),
        slow("straight", "lightning_modules:Reflow.training_step", 8, ("", 6, 13)),
        slow("distilled", "lightning_modules:FlowDistillation.training_step", 8, ("", 6, 13)),
        slow("consistency_distillation", "lightning_modules:ConsistencyDistillation.training_step", 8, ("", 6, 13)),
        slow("ect", "lightning_modules:ECT.training_step", 8, ("", 6, 13)),
        slow("tcm", "lightning_modules:TCM.training_step", 8, ("", 6, 13)),
        slow("scm", "lightning_modules:SCM.training_step", 8, ("", 6, 13)),
        slow("mean_flow", "lightning_modules:MeanFlow.training_step", 8, ("", 6, 13)),
        slow("imm", "lightning_modules:IMM.training_step", 8, ("", 6, 13)),
        slow("cmt", "lightning_modules:CMT.training_step", 8, ("", 6, 13)),
        slow("joint", "lightning_modules:BezierDistillation.training_step", 8, ("", 6, 13)),
    ],
)
def test_a_killed_run_ends_as_one_left_alone(finished, tmp_path, name, target, number, goes_on):
    """goes_on: None where it begins anew, else its stage, the step from which it goes on, and that stage's steps."""
    said = finished.assert_resumes(tmp_path, name, kill_at(target, number), "degradation")
    if goes_on:
        stage, step, steps = goes_on
        images = f"{16 * step} of {16 * steps} images"
        assert said == [f"runs/{name}{stage} goes on from step {step} of {steps} ({images})"]
    else:
        assert not said
    if name == "disback":
        assert nodes(tmp_path)
        assert nodes(tmp_path).items() <= nodes(finished(name)).items()


# -- flows ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_what_a_flow_leaves_and_whether_it_can_teach(finished, monkeypatch, name):
    """Exported plain also where it is trained with two outputs; as a teacher by its run's name only where it is a flow."""
    folder, nfe = finished(name) / "runs" / name, FLOWS[name]
    records = {record["subject"]: record for record in read_json(folder / "metrics.json")}
    assert records["student"]["nfe"] == nfe
    assert ("teacher" in records) == (name != "flow")
    assert (folder / "checkpoints/best.ckpt").exists() == (name != "flow")
    rows = read_csv(folder / "metrics.csv")
    assert len(rows) == 13
    assert any(row.get("heldout/loss") for row in rows) == (name != "flow")
    for row in rows if name == "joint" else ():
        both = float(row["loss/prediction"]) + 0.5 * float(row["loss/drift"])
        assert float(row["loss/student"]) == pytest.approx(both, rel=1e-5)
    finished("flow")
    monkeypatch.chdir(finished(name))
    cfg = OmegaConf.create({"method": {"teachers": [f"runs/{name}"]}})
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        if nfe == 1:  # its weights can be read, but not sampled in many steps
            with pytest.raises(
                ValueError, match=f"the student of runs/{name} was distilled into 1 network evaluations"
            ):
                expand_teachers(cfg)
            cfg.method.teachers = ["runs/flow"]
        expand_teachers(cfg)
    config = OmegaConf.merge(cfg.method.teachers[0], {"weights": f"runs/{name}/student.safetensors", "sha256": None})
    assert build(config).sample(torch.randn(4, 1, 8, 8), torch.arange(4)).isfinite().all()
    weights = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
    channels = {len(value) for key, value in weights.items() if value.ndim == 4 and "heads" in key}
    assert channels == {2 if name == "joint" else 1}


@pytest.mark.slow
def test_a_flow_is_measured_at_several_numbers_of_steps(finished, tmp_path):
    """Euler steps but for its own number, that of its teacher's solver."""
    shutil.copytree(finished("straight"), tmp_path, dirs_exist_ok=True)
    evaluate(tmp_path, "run=runs/straight", "steps=[1,2,5]", "device=cpu").ok()
    records = read_json(tmp_path / "runs/straight/evaluation/metrics.json")
    measured = {record["nfe"]: record["values"] for record in records if record["subject"] == "student"}
    assert list(measured) == [1, 2, 5]
    final = next(r for r in read_json(tmp_path / "runs/straight/metrics.json") if r["subject"] == "student")
    assert measured[5] == final["values"]
    assert measured[1] != measured[2]


@pytest.mark.slow
def test_students_as_teachers_by_their_weights(finished, tmp_path):
    file = finished("joint") / "runs/joint/student.safetensors"
    chosen = ("teacher=digits_rf1", "teacher.network.model_channels=8", f"teacher.weights={file}", "num_samples=20")
    evaluate(tmp_path, *chosen, "blocks=2", "steps=[1]", "device=cpu").ok()
    records = read_json(tmp_path / "runs/teacher-digits_rf1/metrics.json")
    assert {record["subject"]: record["nfe"] for record in records} == {"teacher": 1, "real": 0}


# -- score distillation -----------------------------------------------------------------------------------------------


def test_disback_leaves_its_path_its_cost_and_its_curves(finished):
    folder = finished("disback") / "runs/disback"
    assert {path.name for path in nodes(finished("disback"))} == {"node-000003.safetensors", "node-000008.safetensors"}
    cost = json.loads((folder / "preparation.json").read_text())
    assert (cost["steps"], cost["images"]) == (8, 128)
    rows = read_csv(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 14)]
    assert rows[-1]["progress/student_updates"] == "6"
    # After updates 2, so from step 5 on, the target is the teacher.
    assert [float(row["score/node"]) for row in rows] == [1.0] * 4 + [2.0] * 9
    assert all(rows[-1][key] for key in ("loss/fake", "loss/mismatch", "score/lead", "generator/std"))
    assert len(read_csv(folder / "degradation" / "metrics.csv")) == 8
    state = read_checkpoint(folder / "checkpoints/last.ckpt")
    assert {key.partition(".")[0] for key in state["state_dict"]} == {"student", "fake_score"}
    assert len(state["optimizer_states"]) == 2
    assert {r["subject"] for r in read_json(folder / "metrics.json")} == {"teacher", "student", "real"}


@pytest.mark.slow
def test_another_seed_shares_the_path_and_other_settings_do_not(options, finished, tmp_path):
    finished.begin(tmp_path, "disback")
    before, refuse = snapshot(tmp_path / PATH), kill_at(STAGE_1, 1)
    train(tmp_path, *options["disback"], "name=run", "seed=1", before=refuse).ok()
    assert snapshot(tmp_path / PATH) == before
    assert json.loads((tmp_path / RUN / "preparation.json").read_text())["steps"] == 8
    train(tmp_path, *options["disback"], "name=other", "method.sigma_init=80", before=refuse).killed()


@pytest.mark.slow
def test_a_run_killed_in_stage_1_keeps_its_config(options, finished, tmp_path):
    finished.begin(tmp_path, "disback", "degradation")
    train(tmp_path, *options["disback"], before=kill_at(STAGE_1, 5)).killed()
    changed = train(tmp_path, *options["disback"], "method.degradation.lr=2e-3")
    changed.refused("method.degradation.lr=0.001", "0.002")


@pytest.mark.slow
def test_no_nodes_is_diff_instruct(options, finished, tmp_path):
    """Weights, optimisers and averages, to the last bit."""
    finished.begin(tmp_path, "disback")
    train(tmp_path, *options["disback"], "name=none", "method.nodes=0").ok()
    plain = [o for o in options["disback"] if not re.match(r"method=|method\.(nodes|interval|degradation)", o)]
    train(tmp_path, *plain, "name=plain", "method=diff_instruct").ok()
    ours, theirs = (read_checkpoint(tmp_path / "runs" / n / "checkpoints/last.ckpt") for n in ("none", "plain"))
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_identical(ours[key], theirs[key])
    assert_identical(ours["callbacks"]["EMA"], theirs["callbacks"]["EMA"])


@pytest.mark.slow
def test_a_sweep_over_methods_shares_one_path(options, finished, tmp_path):
    finished.begin(tmp_path, "disback")
    shared = [
        o for o in options["disback"] if not re.match(r"name=|method=|method\.(nodes|interval|degradation|fake)", o)
    ]
    # Hydra looks for plain options in the default method; a choice of one is left to the jobs.
    sweep = ("method=diff_instruct,disback", "method.kimg=0.08", "method.fake_updates=choice(1)")
    train(tmp_path, "-m", *shared, *sweep).ok()
    names = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/metrics.json"))
    assert [name.partition("-")[0] for name in names] == ["diff_instruct", "disback"]
    (default,) = [path for path in (tmp_path / PATH).iterdir() if len(list(path.glob("*.safetensors"))) == 3]
    assert default.name != "disback"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", ("node-000008.safetensors", "is damaged: delete the file and run again")),
        ("foreign", ("belongs to another degradation path", "move that folder away")),
    ],
)
def test_a_bad_path_is_refused_and_left_as_it_is(options, finished, tmp_path, damage, message):
    finished.begin(tmp_path, "disback")
    for file in (tmp_path / PATH).glob("*/node-000008.safetensors"):
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        else:
            card = json.loads(file.with_suffix(".json").read_text())
            file.with_suffix(".json").write_text(json.dumps(card | {"generator": "0" * 64}))
    before = snapshot(tmp_path / PATH)
    train(tmp_path, *options["disback"]).refused(*message)
    assert snapshot(tmp_path / PATH) == before
    assert not (tmp_path / "runs/disback/checkpoints").exists()
    shutil.rmtree(tmp_path / PATH)
    train(tmp_path, *options["disback"]).ok()

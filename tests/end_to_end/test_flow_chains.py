"""evaluate.py flows=...: a chain as a user makes it, with students of each flow, and its misuse."""

import json
import shutil

import pytest
from end_to_end_tools import STUDENT, TINY, copied, evaluate, snapshot, train
from matplotlib.image import imread

SMALL = ("num_samples=20", "blocks=2", "flow_samples=24", "path_steps=3", "device=cpu")
CHAIN = "flows=[runs/rf1,runs/rf2]"


def options(given, name, *changes):
    return (f"name={name}", *(o for o in given if not o.startswith(("name=", "teacher.weights="))), *changes)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two flows, the second made from the first, and a student of the second at two seeds."""
    folder = tmp_path_factory.mktemp("flows")
    train(folder, *options(TINY, "rf1"), "method=rectified_flow").ok()
    teacher = "teacher.weights=runs/rf1/student.safetensors"
    train(folder, *options(STUDENT, "rf2"), "method=reflow", teacher).ok()
    teacher = "teacher.weights=runs/rf2/student.safetensors"
    for seed in (0, 1):
        train(folder, *options(STUDENT, f"one{seed}"), "method=flow_distill", teacher, f"seed={seed}").ok()
    train(folder, *options(STUDENT, "other"), "method=flow_distill", "teacher.weights=null").ok()
    return folder


def test_a_chain_with_its_students(folder, tmp_path):
    copied(folder, tmp_path)
    before = snapshot(tmp_path / "runs")
    ended = evaluate(tmp_path, CHAIN, "data=digits", "distilled=runs/one*", "steps=[1,2]", *SMALL).ok()
    assert ended.out.endswith("runs/flows/flows.json and flows.png written\n")
    for text in ("rf1 (flow_heun)", "fid_digits, Euler 2", "flow_distill (ema_500kimg)", "0, 1"):
        assert text in ended.out
    content = json.loads((tmp_path / "runs/flows/flows.json").read_text())
    assert [flow["name"] for flow in content["flows"]] == ["rf1", "rf2"]
    assert content["flows"][1]["step_drift"]["mean"] > 0
    assert [(r["flow"], r["seed"], r["group"]) for r in content["distilled"]] == [
        (2, 0, "flow_distill"),
        (2, 1, "flow_distill"),
    ]
    assert all(r["regression"]["mean"] > 0 for r in content["distilled"])
    assert content["fingerprint"]["num_samples"] == 20
    assert imread(tmp_path / "runs/flows/flows.png")[..., :3].std() > 0.05
    assert not (tmp_path / "runs/flows/paths.png").exists()  # digits are not planar
    assert before.items() <= snapshot(tmp_path / "runs").items()
    shutil.rmtree(tmp_path / "data" / "measured")
    evaluate(tmp_path, CHAIN, "data=digits", "flows_folder=again", "evaluation.batch_size=7", *SMALL).ok()
    again = json.loads((tmp_path / "again/flows.json").read_text())
    for ours, theirs in zip(again["flows"], content["flows"], strict=True):
        assert ours["straightness"]["mean"] == pytest.approx(theirs["straightness"]["mean"], rel=1e-5)
        assert ours["w2"] == pytest.approx(theirs["w2"], rel=1e-5)


def test_a_flow_beside_itself(folder, tmp_path):
    copied(folder, tmp_path)
    evaluate(tmp_path, "flows=[digits,digits]", "data=digits", *SMALL).ok()
    first, second = json.loads((tmp_path / "runs/flows/flows.json").read_text())["flows"]
    assert (first["step_drift"], second["step_drift"]) == (None, {"mean": 0.0, "error": 0.0})
    assert first["simulated"] == second["simulated"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("flows=[] data=digits", ["flows=[] must be a name or a list of some, such as 'flows=[runs/A,runs/B*]'"]),
        ("flows=[runs/rf1]", ["data is missing: task=flows needs it; say data=NAME"]),
        (
            "flows=[runs/rf3] data=digits",
            ["flows=runs/rf3: there is no run (no runs/rf3/config.yaml)", "or a file in conf/teacher"],
        ),
        ("flows=[runs/rf1] teacher=digits", ["there is no option teacher of task=flows"]),
        ("flows=[runs/rf1] run=runs/rf1", ["there is no option run of task=flows"]),
        (
            "flows=[runs/rf1] data=digits solver=euler",
            ["there is no option solver of task=flows; it is of task=teacher"],
        ),
        ("flows=[runs/rf1] data=digits steps=0", ["steps=0 must be whole numbers from 1 on"]),
        (
            "flows=[runs/rf1] data=digits flow_samples=1000000000000",
            ["flow_samples=1000000000000 (lower it)", "GB of memory"],
        ),
        (
            "flows=[runs/rf1] data=digits weights=raw",
            ["weights=raw is for the runs in distilled, and none are given"],
        ),
        ("flows=5 data=digits", ["flows: 5 is neither a file in conf/teacher nor a run folder"]),
        ("flows=true data=digits", ["flows=True must be a name or a list of some"]),
        ("flows=[runs/rf1] data=digits distilled=[]", ["distilled=[] must be a name or a list of some"]),
        ("flows=[runs/rf1] data=digits flows_folder=true", ["flows_folder=True must be the name of a file or folder"]),
        (
            "flows=[runs/rf1] data=digits flows_folder=runs/rf1/config.yaml",
            ["cannot write runs/rf1/config.yaml/flows.json"],
        ),
        ("flows=[runs/rf1] data=digits flow_samples=1", ["flow_samples must be an integer of at least 2, got 1"]),
        ("flows=[runs/rf1] data=digits path_steps=few", ["path_steps=few: give a whole number"]),
        ("flows=[runs/rf1] data=digits data.conditional=false", ["num_classes=10, the data digits 0"]),
        ("flows=[runs/rf1] data=digits distilled=runs/two*", ["distilled=runs/two* names no run"]),
        ("flows=[runs/rf1] data=digits distilled=runs/other", ["the teacher of runs/other is digits_rf2", "rf1 ("]),
        (
            "run=runs/rf1 distilled=runs/one0",
            ["there is no option distilled of task=runs; it is of task=flows"],
        ),
    ],
)
def test_misuse(folder, options, message):
    before = snapshot(folder)
    evaluate(folder, *options.split()).refused("error: ", *message)
    assert snapshot(folder) == before


def test_an_unfinished_flow(folder, tmp_path):
    copied(folder, tmp_path)
    (tmp_path / "runs/rf2/student.safetensors").unlink()
    evaluate(tmp_path, CHAIN, "data=digits").refused(
        "runs/rf2 is no teacher yet, for it has no student.safetensors; restore it"
    )

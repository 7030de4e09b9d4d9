"""evaluate.py steps=[...]: students at several numbers of steps, and runs trained for one number each."""

import json
import shutil

import pytest
import torch
from end_to_end_tools import RUN, copied, evaluate, read_checkpoint, read_json, snapshot, with_data
from matplotlib.image import imread
from omegaconf import OmegaConf

from launch.run.folder import identity

SETTINGS = ("device=cpu", "num_samples=20", "blocks=2")


@pytest.fixture(scope="module")
def students(finished, tmp_path_factory):
    """few0 and few1, which differ in their seed, of a method for 1 to 4 steps; and `one`, for one step alone."""
    folder = with_data(finished, tmp_path_factory.mktemp("quality"))
    for number, (name, target) in enumerate(
        {"few0": "few_step_method.FewSteps", "few1": "few_step_method.FewSteps", "one": None}.items()
    ):
        shutil.copytree(finished / RUN, folder / "runs" / name)
        config = OmegaConf.load(folder / "runs" / name / "config.yaml")
        config.seed = config.method.seed = config.data.seed = number % 2
        config.name, config.folder = name, f"runs/{name}"
        if target:
            config.method._target_, config.method.name = target, "few"
        OmegaConf.save(config, folder / "runs" / name / "config.yaml")
        whose = identity(OmegaConf.to_container(config), config.method.name)
        for path in (folder / "runs" / name / "checkpoints").glob("*.ckpt"):
            torch.save(read_checkpoint(path) | {"run": whose}, path)
    return folder


@pytest.fixture
def folder(students, tmp_path):
    return copied(students, tmp_path)


def test_a_student_at_several_numbers_of_steps(folder):
    ended = evaluate(folder, "run=runs/few0", "steps=[1,4,2,2]", *SETTINGS).ok()
    records = read_json(folder / "runs/few0/evaluation/metrics.json")
    found = [(r["subject"], r["nfe"], r["fingerprint"]["weights"]) for r in records]
    # The network that is left by a first choice of all numbers is that of 2; real images and the teacher are measured once.
    assert found == [
        ("teacher", 3, None),
        ("student", 1, "of_few"),
        ("student", 4, "of_four"),
        ("student", 2, "of_few"),
        ("real", 0, None),
    ]
    assert len({r["mean"] for r in records}) == 5
    assert ended.out.count("student (of_") == 3
    height, width = imread(folder / "runs/few0/evaluation/samples.png").shape[:2]
    single = imread(folder / "runs/few0/samples.png").shape
    assert width > 1.4 * single[1]  # five columns, not three
    assert height < 1.1 * single[0]
    assert imread(folder / "runs/few0/evaluation/quality.png").shape[:2] == (600, 840)


@pytest.mark.slow
def test_one_number_is_drawn_as_ever(folder):
    evaluate(folder, "run=runs/one", "steps=1", *SETTINGS).ok()
    single, was = (imread(folder / "runs/one" / name).shape for name in ("evaluation/samples.png", "samples.png"))
    assert single == was
    assert not (folder / "runs/one/evaluation/quality.png").exists()


@pytest.mark.slow
def test_several_runs_are_compared_at_every_number(folder):
    ended = evaluate(folder, "run=runs/few*", "steps=[1,2]", *SETTINGS).ok()
    table = ended.out[ended.out.index("fid_digits against NFE") :]
    header = "group seeds 1 NFE 2 NFE 3 NFE kimg seconds network evaluations"
    assert table.splitlines()[1].split() == header.split()
    assert table.splitlines()[3].split()[:3] == ["few", "0,", "1"]
    assert "real images score" in table
    assert "runs/comparison/quality.json and quality.png written" in table
    content = json.loads((folder / "runs/comparison/quality.json").read_text())
    assert [(v["name"], v["nfe"]) for v in content["values"] if v["seed"] is not None][-2:] == [
        ("few1", 1),
        ("few1", 2),
    ]
    assert content["notes"] == []
    assert imread(folder / "runs/comparison/quality.png").shape[:2] == (600, 840)


@pytest.mark.slow
def test_a_teacher_at_several_numbers_is_drawn(folder):
    teacher = ("teacher=digits", "teacher.weights=null", "teacher.network.model_channels=8")
    evaluate(folder, *teacher, "steps=[1,2]", "solver=euler", *SETTINGS).ok()
    assert imread(folder / "runs/teacher-digits/quality.png").shape[:2] == (600, 840)


def test_each_run_is_measured_at_the_numbers_that_it_can_take(folder):
    """And what it can't is said in one line each, before the measurement."""
    ended = evaluate(folder, "run=[runs/few0,runs/one]", "steps=[1,2,5]", "comparison=null", *SETTINGS).ok()
    assert [line for line in ended.out.splitlines() if line.startswith("not measured: ")] == [
        "not measured: steps=5: the students of runs/few0 take 1, 2, 3 or 4",
        "not measured: steps=2: the student takes 1, and no other number (runs/one)",
        "not measured: steps=5: the student takes 1, and no other number (runs/one)",
    ]
    rows = [line.split() for line in ended.out[ended.out.index("fingerprint") :].splitlines()]
    assert [(row[0], row[3]) for row in rows if row[1:2] == ["student"]] == [("few0", "1"), ("few0", "2"), ("one", "1")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "run=runs/few0 steps=[5,6]",
            ["steps=5: the students of runs/few0 take 1, 2, 3 or 4; steps=6: the students of"],
        ),
        ("run=runs/few0 steps=few", ["steps=few must be whole numbers from 1 on", "steps=[1,2,4]"]),
        ("run=runs/few0 steps=[1,[2]]", ["steps=[1, [2]] must be whole numbers"]),
        ("run=runs/few0 steps=[0]", ["steps=[0] must be whole numbers"]),
        ("run=runs/few0 steps=[]", ["steps=[] must be whole numbers"]),
        ("run=runs/few0 solver=euler", ["there is no option solver of task=runs; it is of task=teacher"]),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is(folder, options, message):
    before = snapshot(folder)
    evaluate(folder, *options.split(), *SETTINGS).refused("error: ", *message)
    assert snapshot(folder) == before

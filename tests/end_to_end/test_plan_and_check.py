"""plan=true and task=self_test as commands: what they say, and that they start nothing."""

import json

import pytest
from end_to_end_tools import STUDENT, evaluate, train
from PIL import Image


def test_a_plan_starts_nothing(tmp_path):
    ended = train(tmp_path, "method=disback", "data=ffhq64", "trainer.devices=8", "plan=true").ok()
    assert "2,500 per kimg" in ended.out
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".out", ".err")]
    assert not list(tmp_path.glob("runs/*"))  # nor an empty folder


@pytest.mark.slow
def test_a_plan_says_which_folder_is_which_class(tmp_path):
    for number in (1, 2, 10):
        (tmp_path / "pictures" / str(number)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / str(number) / "a.png")
    own = (
        "method=pretrain",
        "data=image_folder",
        "data.path=pictures",
        "plan=true",
        "teacher.network.model_channels=16",
    )
    ended = train(tmp_path, *own, "data.resolution=32", "data.num_classes=3").ok()
    assert "classes by folder: 1 -> 0, 10 -> 1, 2 -> 2 (data.class_order=natural counts 1, 2, 10)" in ended.out
    train(tmp_path, *own, "data.resolution=32", "data.num_classes=4").refused("3 class folders", "data.num_classes=4")


@pytest.mark.slow
def test_neither_plan_nor_download_belong_to_a_run(tmp_path):
    """They change nothing, so a run that was planned, or begun with download=true, goes on without."""
    train(tmp_path, *STUDENT, "download=true").ok()
    config = (tmp_path / "runs/run/config.yaml").read_text()
    assert not {"plan:", "download:"} & set(config.split())
    assert "is complete" in train(tmp_path, *STUDENT).ok().out
    assert "1,000 per kimg" in train(tmp_path, *STUDENT, "plan=true").ok().out


def test_a_teacher_that_is_right_passes_and_leaves_a_picture(tmp_path):
    ended = evaluate(tmp_path, "task=self_test", "teacher=digits", "device=cpu").ok()
    assert ended.out.count("passed") == 7
    folder = tmp_path / "runs/teacher-digits"
    content = json.loads((folder / "check.json").read_text())
    assert content["images"] == "64 real ones"
    assert all(check["passed"] for check in content["checks"])
    assert len(content["levels"]) == 9
    assert (folder / "check.png").stat().st_size > 10_000


def test_one_that_is_wrong_fails_with_one_line(tmp_path):
    wrong = (
        "~teacher.preconditioning.sigma_data",
        "teacher.preconditioning._target_=stillhouse.diffusion.preconditioning.V",
    )
    evaluate(tmp_path, "task=self_test", "teacher=digits", "device=cpu", *wrong).refused(
        "teacher digits fails its self-test", "parameterisation", "EDM 0.7", "check.png"
    )
    assert not json.loads((tmp_path / "runs/teacher-digits/check.json").read_text())["checks"][0]["passed"]


def test_what_cannot_be_checked_is_said(tmp_path):
    evaluate(
        tmp_path, "task=self_test", "teacher=digits", "data.conditional=false", "teacher.conditional=true"
    ).refused("teacher digits has num_classes=10, the data digits 0")

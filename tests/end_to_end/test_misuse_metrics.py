"""What can't be measured is refused before pictures are packed, and says what can: evaluation=pixels, evaluation=none."""

import json

import numpy as np
import pytest
from end_to_end_tools import PRETRAIN, RUN, evaluate, read_csv, snapshot, train
from PIL import Image

from stillhouse.metrics.records import load_records

PICTURES = (
    *(option for option in PRETRAIN if not option.startswith("evaluation.")),
    "data=image_folder",
    "data.path=pictures",
    "data.resolution=16",
    "teacher.network.channel_mult=[1,2]",
    "teacher.network.attn_resolutions=[]",
    "evaluation.training.every_kimg=0.08",
)
SIZES = (
    "evaluation.num_samples=20",
    "evaluation.blocks=2",
    "evaluation.batch_size=20",
    "evaluation.training.num_samples=20",
)
WAYS_OUT = ["evaluation=pixels needs no weights", "evaluation=none trains without a measurement"]


def draw(folder, count):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(256, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "pictures", 12)
    draw(folder / "one", 1)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("evaluation.metrics=[]", ["evaluation.metrics must be a list", "got []", *WAYS_OUT]),
        ("evaluation.metrics=none", ["evaluation.metrics must be a list", "got 'none'", *WAYS_OUT]),
        ("evaluation.metrics=null", ["evaluation.metrics must be a list", "got None", *WAYS_OUT]),
        ("evaluation.extractor=null", ["evaluation.extractor=null", *WAYS_OUT]),
        (
            "evaluation.num_samples=0",
            ["evaluation.num_samples must be a whole number of at least 10, got 0", *WAYS_OUT],
        ),
        ("evaluation.num_samples=1e12", ["evaluation.num_samples=1000000000000.0: give a whole number"]),
        ("evaluation.num_samples=1000000000000", ["evaluation.num_samples=1000000000000 in blocks=3", "lower them"]),
        ("evaluation.blocks=100000000000", ["evaluation.num_samples=10000 in blocks=100000000000", "lower them"]),
        (
            "evaluation.num_samples=2000000000 evaluation.blocks=1",
            ["evaluation.num_samples=2000000000", "GB of memory"],
        ),
        ("evaluation.training.num_samples=5", ["callbacks.metrics.num_samples must be a whole number of at least 10"]),
        (
            "evaluation.num_samples=2000000 evaluation.batch_size=1000000000 data.resolution=2048",
            ["evaluation.batch_size=2000000 (lower it)", "GB of memory"],
        ),
        ("evaluation=digits", ["the digits extractor reads uint8 images (N, 1, 8, 8)", *WAYS_OUT]),
        ("evaluation.labels=fair", ["evaluation.labels must be one of uniform, data, got 'fair'"]),
        ("evaluation=inception", ["no inception-v3-compat weights at weights/", "add download=true", *WAYS_OUT]),
    ],
)
def test_what_is_not_measurable_is_refused_before_packing(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = snapshot(folder)
    train(folder, *PICTURES, "evaluation=pixels", *options.split()).refused(*message)
    assert snapshot(folder) == before


def test_one_picture_is_too_few_for_a_covariance(folder):
    train(folder, *PICTURES, "evaluation=pixels", "data.path=one").refused(
        "fid compares with 2 real images at least, and the data set has 1", "evaluation=none"
    )
    assert not (folder / RUN / "checkpoints").exists()


def test_pictures_are_measured_without_weights_under_another_name(folder):
    train(folder, *PICTURES, *SIZES, "evaluation=pixels", "name=pixels").ok()
    records = load_records(folder / "runs/pixels/metrics.json")
    assert {(record.metric, record.subject) for record in records} == {("fd_pixels", "student"), ("fd_pixels", "real")}
    assert [row["step"] for row in read_csv(folder / "runs/pixels/metrics.csv") if row["fd_pixels_20/ema_500kimg"]]


def test_a_run_without_a_measurement_is_complete_and_all_else_copes(folder):
    train(folder, *PICTURES, "evaluation=none").ok()
    assert json.loads((folder / RUN / "metrics.json").read_text()) == {"measured": "nothing, by evaluation=none"}
    left = {path.name for path in (folder / RUN).iterdir()}
    assert {"student.safetensors", "samples.png", "interpolation.png", "samples", "curves.png"} <= left
    again = train(folder, *PICTURES, "evaluation=none").ok()
    assert "is complete:\n\nnothing was measured, by evaluation=none" in again.out
    planned = train(folder, *PICTURES, "evaluation=none", "name=planned", "plan=true").ok()
    assert "missing\n  nothing" in planned.out
    evaluate(folder, f"run={RUN}").refused(
        "evaluation=none measures nothing: it was trained so; choose another one by +evaluation=pixels"
    )
    evaluate(folder, "teacher=digits", "evaluation=none").refused("evaluation=none", "choose another")
    ended = evaluate(folder, f"run={RUN}", "+evaluation=pixels", "num_samples=20", "blocks=1").ok()
    assert "fd_pixels" in ended.out
    evaluate(folder, "run=[runs/*]", "report=report.html").ok()
    assert "not measured (run)" in (folder / "report.html").read_text()

"""evaluation=pixels and evaluation=none: what they leave, and that all else copes with it."""

import json

import pytest
from end_to_end_tools import PRETRAIN, RUN, evaluate, read_csv, train
from picture_files import encoded, folder_of, pattern

from stillhouse.metrics.records import load_records

PICTURES = (
    *(option for option in PRETRAIN if not option.startswith("evaluation.")),
    *("data=image_folder", "data.path=pictures", "data.resolution=16"),
    *("teacher.network.channel_mult=[1,2]", "teacher.network.attn_resolutions=[]"),
    "evaluation.training.every_kimg=0.08",
)
SIZES = (
    *("evaluation.num_samples=20", "evaluation.blocks=2", "evaluation.batch_size=20"),
    "evaluation.training.num_samples=20",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    folder_of(folder / "pictures", {f"{i}.png": encoded(pattern(20, 20, shift=i), "PNG") for i in range(12)})
    return folder


@pytest.mark.slow
def test_pictures_are_measured_without_weights_under_another_name(folder):
    train(folder, *PICTURES, *SIZES, "evaluation=pixels", "name=pixels").ok()
    records = load_records(folder / "runs/pixels/metrics.json")
    assert {(record.metric, record.subject) for record in records} == {("fd_pixels", "student"), ("fd_pixels", "real")}
    assert [row["step"] for row in read_csv(folder / "runs/pixels/metrics.csv") if row["fd_pixels_20/ema_500kimg"]]


@pytest.mark.slow
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
        "evaluation=none measures nothing: it was trained so; choose another one by evaluation=pixels"
    )
    ended = evaluate(folder, f"run={RUN}", "evaluation=pixels", "num_samples=20", "blocks=1").ok()
    assert "fd_pixels" in ended.out
    evaluate(folder, "task=report", "run=[runs/*]", "target=report.html").ok()
    assert "not measured (run)" in (folder / "report.html").read_text()

"""The benchmarks run and report; how fast anything is, is not tested here."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import bare_loop, loader, run, training
from benchmarks.cases import DIGITS

TINY = replace(
    DIGITS,
    overrides=("batch_size=4", "teacher.weights=null", "teacher.sha256=null", "teacher.steps=2"),
    warmup=4,
    window=2,
    rounds=2,
    sampling_rounds=2,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setitem(run.PARTS, "digits", lambda: training.measure(TINY))
    monkeypatch.setitem(run.PARTS, "loader", lambda: loader.measure(count=200, batch_size=8, rounds=2))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")


def assert_spread(figure: dict, repeats: int, positive: bool = True) -> None:
    assert set(figure) == {"median", "min", "max", "repeats"}
    assert all(map(math.isfinite, figure.values()))
    assert figure["min"] <= figure["median"] <= figure["max"]
    assert figure["repeats"] == repeats
    assert figure["min"] > 0 or not positive


def test_digits_are_measured_printed_and_recorded(capsys, tmp_path):
    run.main(["--only", "digits", "--record"])
    (path,) = (tmp_path / "results").iterdir()
    (stored,) = json.loads(path.read_text()).values()
    assert stored["command"] == "python -m benchmarks.run --only digits --record"
    assert {"date", "commit"} <= set(stored)
    assert stored["machine"]["threads"] == torch.get_num_threads()
    assert stored["machine"]["cores"] >= 1
    assert stored["batch_size"] == 4
    assert stored["checkpoint_every_n_steps"] == 100  # the default, though none is due within a window
    assert stored["loss_difference"] < 1e-6 or stored["device"] != "cpu"
    assert stored["checkpoint_share_of_step"] > 0
    assert (stored["teacher_nfe"], stored["student_nfe"]) == (3, 1)
    for key in ("seconds_per_step", "bare_seconds_per_step"):
        assert_spread(stored[key], TINY.rounds)
    assert_spread(stored["overhead"], TINY.rounds, positive=False)
    assert_spread(stored["checkpoint_seconds"], 3)
    for key in ("teacher_samples_per_second", "student_samples_per_second", "speed_up"):
        assert_spread(stored[key], TINY.sampling_rounds)
    printed = capsys.readouterr().out
    for words in ("overhead of the framework", "pairs from 2 heun steps", "samples/s", f"{path} written"):
        assert words in printed


def test_a_recorded_part_leaves_the_others(tmp_path):
    here = {"machine": {"gpu": None, "cpu": "Some CPU (tm)"}}
    path = run.record({"digits": here, "loader": here}, tmp_path)
    assert path.name == "benchmarks-some-cpu-tm.json"
    run.record({"loader": {**here, "images": 1}}, tmp_path)
    assert json.loads(path.read_text()) == {"digits": here, "loader": {**here, "images": 1}}


def test_loader_is_measured():
    result = run.PARTS["loader"]()
    loaders = ("", "decoded_", "per_item_", "png_0_workers_", "png_2_workers_")
    for key in [f"{name}images_per_second" for name in loaders]:
        assert_spread(result[key], 2)
    for key in ("over_per_item", "over_png_0_workers", "over_png_2_workers"):
        assert_spread(result[key], 2)
    text = run.table(result)
    assert text.count("loader over that") == 2


def test_a_bare_loop_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setattr(bare_loop, "regression", lambda output, target, kind: (output - target).abs().flatten(1).sum(1))
    with pytest.raises(RuntimeError, match="no longer computes what denoising_student does"):
        training.measure(TINY)

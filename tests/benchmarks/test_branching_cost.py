"""The benchmark of branches: what it counts, refuses and prints; not how fast anything is."""

import json

import pytest
import torch
from test_benchmarks import TINY, assert_spread

from benchmarks import branching, run
from results.pages import section
from stillhouse.networks import BranchedConv2d


@pytest.fixture(scope="module")
def measured():
    return branching.measure(TINY, branches=3)


def test_steps_inference_and_operations_are_measured(measured):
    for key in ("step", "inference"):
        assert_spread(measured[f"plain_{key}_seconds"], TINY.rounds)
        assert_spread(measured[f"branched_{key}_seconds"], TINY.rounds)
        assert_spread(measured[f"branched_{key}_over_plain"], TINY.rounds, positive=False)
    width = 32
    assert measured["added_parameters"] == 2 * (9 * width + 1)
    # Forward, gradient by the weights and gradient by the features: each a multiplication and an addition per weight and pixel.
    added = 3 * 2 * measured["batch_size"] * 8 * 8 * 2 * 9 * width
    step, inference = measured["step_operations"], measured["inference_operations"]
    assert step["branched"] - step["plain"] == added
    assert inference["branched"] == inference["plain"]
    assert 2.9 < step["plain"] / inference["plain"] < 3


def test_it_is_printed_here_and_in_the_readme(monkeypatch, capsys, measured, tmp_path):
    monkeypatch.setitem(run.PARTS, "branching", lambda: measured)
    run.main(["--only", "branching"])
    printed = capsys.readouterr().out
    for words in (
        "3 branches against 1, digits, as in conf/",
        "batch 4, 0.31 M parameters, teacher random\n",
        "training step, all branches",
        "added to inference",
        "The branches add 578 parameters. Floating point operations, counted: +",
        " to a step, +0.000% of ",
    ):
        assert words in printed
    path = tmp_path / "benchmarks-cpu.json"
    path.write_text(json.dumps({"branching": measured}))
    assert run.table(measured) in section(path)


def test_an_inference_that_is_not_the_plain_networks_is_refused(monkeypatch):
    monkeypatch.setattr(BranchedConv2d, "end_point", lambda conv, rows: 2 * rows[-conv.out_channels :] + 1)
    with pytest.raises(RuntimeError, match="with 3 branches is not the plain network's"):
        branching.measure(TINY, branches=3)


def test_calls_alternate():
    order = []
    first, second = branching.in_turn(TINY, torch.device("cpu"), lambda: order.append(1), lambda: order.append(2))
    assert order == [1, 2] * (TINY.warmup + TINY.rounds * TINY.window)
    assert len(first) == len(second) == TINY.rounds

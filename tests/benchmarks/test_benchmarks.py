"""Every part of the benchmarks runs, checks itself and reports; how fast anything is, is not tested here."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks import bare_loop, branching, features, loader, methods, packing, run, scaling, score, training
from benchmarks.cases import DIGITS, Case
from benchmarks.measuring import ROOT
from lightning_modules import DiffInstruct, ProgressiveDistillation
from results.pages import section
from stillhouse.networks import BranchedConv2d

pytestmark = pytest.mark.slow

RANDOM = ("batch_size=4", "teacher.weights=null", "teacher.sha256=null")
TINY = replace(
    DIGITS,
    overrides=(*RANDOM, "teacher.network.model_channels=8", "teacher.steps=2"),
    **{"warmup": 4, "window": 2, "rounds": 2, "sampling_rounds": 2, "cycles": 2, "cycle_rounds": 2},
)
ANY_DATA = Case("digits, tiny", ("data=digits", "~recipe", *RANDOM, "teacher.network.model_channels=8"), cycle_rounds=1)
PARTS = {
    "digits": lambda: training.measure(TINY),
    "loader": lambda: loader.measure(count=200, batch_size=8, rounds=2),
    "packing": lambda: packing.measure(count=20, jpegs=6, side=80, rounds=2),
    "features": lambda: features.measure(batches=(2,), side=8, rounds=1),
    "score": lambda: score.measure((TINY,)),
    "branching": lambda: branching.measure(TINY, branches=3),
    "scaling": lambda: scaling.measure(replace(TINY, rounds=1)),
    "methods": lambda: methods.measure(ANY_DATA, precisions=("32-true",)),
}


def figures(result) -> Iterator[dict]:
    """Every summary of repeated measurements in a part's result."""
    if isinstance(result, dict) and result.keys() == {"median", "min", "max", "repeats"}:
        yield result
    elif isinstance(result, dict | list):
        for part in result.values() if isinstance(result, dict) else result:
            yield from figures(part)


def in_this_process(function, *arguments):
    return function(*arguments)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_measured_printed_and_recorded(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(run.PARTS, name, PARTS[name])
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "in_new_process", in_this_process)
    run.main(["--only", name, "--record"])
    (path,) = tmp_path.iterdir()
    (stored,) = json.loads(path.read_text()).values()
    assert stored["command"] == f"python -m benchmarks.run --only {name} --record"
    assert {"date", "commit", "machine"} <= set(stored)
    found = list(figures(stored))
    assert len(found) > 1
    assert all(math.isfinite(value) for figure in found for value in figure.values())
    assert all(figure["min"] <= figure["median"] <= figure["max"] for figure in found)
    table = run.table(stored)
    assert table in capsys.readouterr().out
    assert table in section(path)


def test_every_method_and_host_is_measured():
    options = [option for options in methods.METHODS.values() for option in options]
    for group in ("method", "host"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"{group}={path.stem}" in options


# -- what is measured beside each other has to compute the same ----------------------------------------------------------


def test_a_bare_loop_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setattr(bare_loop, "regression", lambda output, target, kind: (output - target).abs().flatten(1).sum(1))
    with pytest.raises(RuntimeError, match="no longer computes what denoising_student does"):
        training.measure(TINY)


def test_an_inference_that_is_not_the_plain_networks_is_refused(monkeypatch):
    monkeypatch.setattr(BranchedConv2d, "end_point", lambda conv, rows: 2 * rows[-conv.out_channels :] + 1)
    with pytest.raises(RuntimeError, match="with 3 branches is not the plain network's"):
        branching.measure(TINY, branches=3)


def test_evaluations_other_than_the_floors_are_refused(monkeypatch):
    monkeypatch.setattr(
        DiffInstruct, "generator_loss", lambda self, batch, noise, labels: self.fake_score_loss(batch, noise, labels)
    )
    with pytest.raises(RuntimeError, match="its floor in benchmarks/floor.py is .*student 1 time with gradient"):
        score.timed(TINY, "32-true", two_sided=False)


def test_wrong_figures_of_a_plan_are_noticed(monkeypatch):
    monkeypatch.setattr(ProgressiveDistillation, "evaluations", {"student": 1.0})
    with pytest.raises(RuntimeError, match="network evaluations per image, but .* sum to 1: correct"):
        methods.measure_one(ANY_DATA, "progressive", methods.METHODS["progressive"], "32-true")

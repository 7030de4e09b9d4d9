"""python train.py -m hydra/sweeper=search (or a sweep=NAME that says so): a search over options, by Optuna."""

import fcntl
import json
import math
import re
import sys

import optuna
import pytest
from end_to_end_tools import PRETRAIN, TINY, copied, kill_at, read_csv, snapshot, train
from omegaconf import OmegaConf

from launch.sweep.study import open_study

pytestmark = pytest.mark.slow  # many processes from the beginning

FOLDER = "runs/search"
PLAIN = ("-m", "hydra/sweeper=search", f"hydra.sweep.dir={FOLDER}", *PRETRAIN, "callbacks.grid=null")
PRUNER = ("hydra.sweeper.pruner=median", "hydra.sweeper.n_startup_trials=1", "hydra.sweeper.pruner_warmup=0")
SPACE = ("method.lr=tag(log,interval(1e-5,1e-1))", "method.p_mean=range(-2,1)", "method.p_std=1.0,1.2")
SEARCH = (*PLAIN, *PRUNER, *SPACE, "hydra.sweeper.n_trials=5")
COLUMN = "fid_digits_20/ema_500kimg"


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    ended = train(folder, *SEARCH).ok()
    (folder / "said").write_text(ended.out)
    return folder


def trials(folder):
    """What the study holds of each trial but times: parameters, state, value, and all that was reported."""
    found = open_study(folder / FOLDER).get_trials()
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in found]


def curve(path):
    return [float(row[COLUMN]) for row in read_csv(path / "metrics.csv") if row[COLUMN]]


def run_of(folder, params):
    """The run folder of a trial, found by its config."""
    for path in (folder / FOLDER).glob("run-*"):
        method = OmegaConf.load(path / "config.yaml").method
        if all(float(method[key.removeprefix("method.")]) == float(value) for key, value in params.items()):
            return path
    raise AssertionError(params)


def test_the_best_is_the_least_of_what_the_runs_curves_end_at(searched):
    ended = {}
    for number, state, params, value, reported in trials(searched):
        path = run_of(searched, params)
        measured = curve(path)
        assert reported == pytest.approx(dict(zip((80, 160, 208), measured, strict=False)), rel=1e-6)
        if state == "COMPLETE":
            final = json.loads((path / "metrics.json").read_text())
            assert all(not math.isclose(value, v) for record in final for v in record["values"])  # of other seeds
            assert (len(measured), value) == (3, measured[-1])
            ended[number] = value
    best = OmegaConf.load(searched / FOLDER / "best.yaml")
    assert ended[best.trial] == best.value == min(ended.values())
    assert (searched / best.run) == run_of(searched, trials(searched)[best.trial][2])
    assert f"best: trial {best.trial} with {best.value:.4g}" in (searched / "said").read_text()
    assert f"| {best.value:.4g} |" in (searched / FOLDER / "search.md").read_text()


def test_a_hopeless_run_is_ended(searched):
    """Where its best value is worse than the median of the complete ones at as many images."""
    found = trials(searched)
    pruned = [one for one in found if one[1] == "PRUNED"]
    assert pruned
    assert {one[1] for one in found} == {"COMPLETE", "PRUNED"}
    table = (searched / FOLDER / "search.md").read_text()
    for number, _, params, _, reported in pruned:
        path = run_of(searched, params)
        note = json.loads((path / "pruned.json").read_text())
        assert (note["trial"], note["nimg"]) == (number, max(reported))
        assert not (path / "metrics.json").exists()
        assert (path / "checkpoints/last.ckpt").exists()
        earlier = sorted(one[4][note["nimg"]] for one in found[:number] if one[1] == "COMPLETE")
        middle = len(earlier) // 2
        assert min(reported.values()) > (earlier[middle] + earlier[~middle]) / 2
        assert re.search(rf"\| {re.escape(path.name)} \| pruned \| {number} \|", table)
    assert (searched / "said").read_text().count(" pruned after ") == len(pruned)


def test_a_killed_search_goes_on_as_if_nothing_had_happened(searched, tmp_path):
    """In its second run, of which a checkpoint is there."""
    train(tmp_path, *SEARCH, before=kill_at("callbacks:GenerativeMetrics.evaluate", 4)).killed()
    assert [state for _, state, *_ in trials(tmp_path)] == ["COMPLETE", "RUNNING"]
    train(tmp_path, *SEARCH).ok()
    assert trials(tmp_path) == trials(searched)
    before = snapshot(tmp_path)
    again = train(tmp_path, *SEARCH).ok()
    assert "step" not in again.err
    after = snapshot(tmp_path)
    assert {path for path in after if after[path] != before[path]} <= {f"{FOLDER}/best.yaml", f"{FOLDER}/search.md"}


def test_a_longer_search_draws_what_is_missing_and_a_pruned_run_can_be_finished_by_hand(searched, tmp_path):
    folder = copied(searched, tmp_path / "longer")
    number, _, params, *_ = next(one for one in trials(folder) if one[1] == "PRUNED")
    path = run_of(folder, params)
    options = [f"{key}={value}" for key, value in params.items()]
    train(folder, *PRETRAIN, "callbacks.grid=null", *options, f"hydra.run.dir={path.relative_to(folder)}").ok()
    assert (path / "metrics.json").exists()
    assert len(curve(path)) == 3
    before = {name: stamp for name, stamp in snapshot(folder / FOLDER).items() if name.startswith("run-")}
    train(folder, *SEARCH, "hydra.sweeper.n_trials=6").ok()
    assert before.items() <= snapshot(folder / FOLDER).items()
    found = trials(folder)
    assert found[:5] == trials(searched)
    assert len(found) == 6
    assert all(found[5][2] != one[2] for one in found[:5])
    assert f"| {path.name} | complete | {number} |" in (folder / FOLDER / "search.md").read_text()


def test_a_failed_trial_does_not_stop_the_others_and_is_drawn_anew(tmp_path):
    fails = (*PLAIN, "method.lr=choice(1e-3,-1)", "hydra.sweeper.n_trials=2", "hydra.sweeper.seed=3")
    ended = train(tmp_path, *fails)
    states = [state for _, state, *_ in trials(tmp_path)]
    assert sorted(states) == ["COMPLETE", "FAIL"]
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert len(ended.errors) == 1
    assert "lr must be a positive number" in ended.errors[0]
    assert ended.out.count("failed: method: lr must be a positive number, got -1") == 1
    train(tmp_path, *fails)
    assert [state for _, state, *_ in trials(tmp_path)][:2] == states
    assert len(trials(tmp_path)) == 3
    changed = train(tmp_path, *fails, "method.warmup_kimg=0.05")
    changed.refused("was begun with method.warmup_kimg=0.1, but this command has method.warmup_kimg=0.05")
    with (tmp_path / FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        train(tmp_path, *fails).refused(f"{FOLDER}: another process runs this search")


def test_both_processes_of_a_run_end_when_it_is_pruned(tmp_path):
    study = open_study(tmp_path / FOLDER)
    space = {"method.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1)}
    perfect = {80: 0.0, 160: 0.0, 208: 0.0}
    study.add_trial(
        optuna.trial.create_trial(
            value=0.0, params={"method.lr": 1e-2}, distributions=space, intermediate_values=perfect
        )
    )
    two = ("method.lr=interval(1e-5,1e-1)", "hydra.sweeper.n_trials=2", "trainer.devices=2")
    ended = train(tmp_path, *PLAIN, *PRUNER, *two).ok()
    assert [state for _, state, *_ in trials(tmp_path)] == ["COMPLETE", "PRUNED"]
    assert list(trials(tmp_path)[1][4]) == [80]
    assert ended.out.count(" pruned after 0.08 of 0.208 kimg") == 2  # each says so


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["logger.csv", "callbacks.metrics"])
def test_a_search_without_a_curve_is_refused_before_training(tmp_path, key):
    """In the one that the project comes with."""
    ended = train(tmp_path, "-m", "sweep=b_dense_branch_weights", *TINY, f"{key}=null", "hydra.sweeper.n_trials=1")
    ended.refused(f"with {key}=null there is no curve")
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ("needs an option to search over",)),
        (("method.lr=choice(1,2)", "hydra.sweeper.pruner=hyper"), ("hydra.sweeper.pruner=hyper", "median")),
        (("method.lr=choice(1,2)", "plan=true"), ("plan=true is for runs",)),
    ],
)
def test_impossible_searches_are_refused(tmp_path, options, parts):
    train(tmp_path, *PLAIN, *options).refused(*parts)
    assert not (tmp_path / "runs").exists()


def hide_optuna() -> None:
    sys.modules["optuna"] = None


def test_a_missing_optuna_is_named(tmp_path):
    train(tmp_path, *SEARCH, before=hide_optuna).refused("needs the package optuna", "pip install -e '.[optuna]'")

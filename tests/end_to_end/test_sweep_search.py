"""python train.py -m sweep=NAME: a search over options, by Optuna."""

import json
import math
import sys

import pytest
from end_to_end_tools import TINY, copied, read_csv, snapshot, train
from omegaconf import OmegaConf

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

SEARCH = ("-m", "sweep=b_dense_branch_weights", *TINY, "callbacks.grid=null", "hydra.sweeper.n_trials=2")
FOLDER = "runs/b_dense_branch_weights-digits"
TRIED = ("auxiliary", "weights", "fade")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    train(folder, *SEARCH).ok()
    return folder


def test_the_best_is_the_least_of_what_the_runs_curves_end_at(searched):
    found = {}
    for path in sorted((searched / FOLDER).glob("run-*")):
        config = OmegaConf.load(path / "config.yaml")
        assert (config.method.name, config.seed) == ("b_dense_sfd", 100)
        measured = [row["fid_digits_20/raw"] for row in read_csv(path / "metrics.csv") if row["fid_digits_20/raw"]]
        assert len(measured) == 3
        final = json.loads((path / "metrics.json").read_text())
        value = float(measured[-1])
        assert all(not math.isclose(value, v) for record in final for v in record["values"])  # of other seeds
        found[tuple(config.method[key] for key in TRIED)] = value
    assert len(found) == 2
    assert len({auxiliary for auxiliary, *_ in found}) == 2
    results = OmegaConf.load(searched / FOLDER / "optimization_results.yaml")
    best = tuple(results.best_params[f"method.{key}"] for key in TRIED)
    assert results.best_value == min(found.values())
    assert found[tuple(None if value == "null" else value for value in best)] == results.best_value


def test_a_longer_search_begins_with_the_runs_that_are_there(searched, tmp_path):
    folder = copied(searched, tmp_path / "longer")
    before = {path: stamp for path, stamp in snapshot(folder / FOLDER).items() if path.startswith("run-")}
    ended = train(folder, *SEARCH, "hydra.sweeper.n_trials=3").ok()
    assert ended.out.count("is complete") == 2
    assert before.items() <= snapshot(folder / FOLDER).items()
    assert len(list((folder / FOLDER).glob("run-*"))) == 3
    was, now = (OmegaConf.load(f / FOLDER / "optimization_results.yaml").best_value for f in (searched, folder))
    assert now <= was


@pytest.mark.parametrize("key", ["logger.csv", "callbacks.metrics"])
def test_a_search_without_a_curve_is_refused_before_training(tmp_path, key):
    train(tmp_path, *SEARCH, f"{key}=null").refused(f"with {key}=null there is no curve")
    assert not list(tmp_path.rglob("config.yaml"))


def hide_the_plugin() -> None:
    sys.modules["hydra_plugins.hydra_optuna_sweeper"] = None


def test_a_missing_plugin_is_named(tmp_path):
    train(tmp_path, *SEARCH, before=hide_the_plugin).refused_by_hydra("optuna")

"""What the values of evaluate.py's options mean, and which ones are refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.evaluate.options import compute_device, evaluation_settings, names, path_option, run_folders, step_counts


@pytest.mark.parametrize("value", [True, None, [], [["a"]], {"a": 1}, [None]])
def test_what_is_no_name_is_refused(value):
    given = OmegaConf.create(value) if isinstance(value, list | dict) else value
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        names(given, "run")
    assert str(refused.value) == f"run={value} must be a name or a list of some, such as 'run=[runs/A,runs/B*]'"


def test_names_and_patterns_stand_for_run_folders_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "a2", "b[1]"):
        Path(name).mkdir()
        Path(name, "config.yaml").touch()
    Path("a-teacher").mkdir()
    assert run_folders(OmegaConf.create(["a2", "a*", "b[1]"])) == [Path("a2"), Path("a1"), Path("b[1]")]
    for value, missing in (("none", "none"), ("a-teacher", "a-teacher"), (5, "5"), (["a1", "b*c"], "b*c")):
        with pytest.raises(FileNotFoundError) as refused:
            run_folders(OmegaConf.create(value) if isinstance(value, list) else value)
        assert str(refused.value) == f"run={missing} names no run (a folder with the config.yaml that train.py writes)"


def test_numbers_of_steps_are_whole_and_each_is_taken_once():
    assert step_counts(None) == []
    assert step_counts(4) == [4]
    assert step_counts(OmegaConf.create([2, 1, 2])) == [2, 1]
    for value in (0, True, "few", [], [[2]], [0], [True], {"a": 1}, 2.0):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            step_counts(OmegaConf.create(value) if isinstance(value, list | dict) else value)
        assert str(refused.value) == f"steps={value} must be whole numbers from 1 on, such as 'steps=[1,2,4]'"


def test_a_place_has_a_name():
    assert path_option(OmegaConf.create({"target": 5}), "target") == Path("5")
    for value in (True, None, "", ["a"]):
        with pytest.raises(ValueError, match="^target=.* must be the name of a file or folder$"):
            path_option(OmegaConf.create({"target": value}), "target")


def test_a_device_that_is_not_here_is_refused():
    assert compute_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"^device=abacus can't be used here \(.*\); choose cpu, cuda or auto$"):
        compute_device("abacus")


def test_the_commands_settings_come_before_the_runs():
    """And evaluation=none measures nothing, of a run or of a teacher."""
    digits = {"extractor": {"_target_": "stillhouse.metrics.extractors.Digits"}, "metrics": ["fid"], "num_samples": 20}
    none = {"extractor": None, "metrics": None}
    changes = {"num_samples": 30, "blocks": 2, "metrics": None}
    stored = OmegaConf.create({"evaluation": digits})
    settings = evaluation_settings(OmegaConf.create(changes), stored)
    assert (settings["num_samples"], settings["blocks"], settings["metrics"]) == (30, 2, ["fid"])
    nothing = OmegaConf.create(changes | {"evaluation": none})
    for run in (None, stored):
        with pytest.raises(ValueError, match="^evaluation=none measures nothing: "):
            evaluation_settings(nothing, run)
    with pytest.raises(ValueError, match="measures nothing: choose another one$"):
        evaluation_settings(nothing)
    with pytest.raises(ValueError, match=r"^evaluation is missing: say evaluation=NAME \(conf/evaluation\)$"):
        evaluation_settings(OmegaConf.create(changes))
    with pytest.raises(ValueError, match="it was trained so; choose another one by evaluation=pixels$"):
        evaluation_settings(OmegaConf.create(changes), OmegaConf.create({"evaluation": none}))

"""What a search minimises, and what it refuses before a trial trains."""

import pytest
from omegaconf import OmegaConf

from launch.run.folder import RunFolder
from launch.sweep.search import check_measured, last_monitored
from launch.sweep.study import trial_number

HEAD = "step,nimg,progress/student_updates,speed/training_seconds,loss/student,fid_digits_20/raw\n"


def test_it_is_the_last_value_of_the_curve(tmp_path):
    rows = "0,10,,,3,\n1,20,2,0.1,,9\n3,40,4,0.2,,4\n5,60,6,0.3,,5.5\n6,70,,,2,\n"
    (tmp_path / "metrics.csv").write_text(HEAD + rows)
    assert last_monitored(RunFolder(tmp_path), needed=True) == 5.5


@pytest.mark.parametrize("content", [None, "", "step,loss/student\n0,3\n", HEAD + "1,20,2,0.1,,9\n"])
def test_a_run_without_a_curve_has_none_and_fails_in_a_search_alone(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    assert last_monitored(RunFolder(tmp_path), needed=False) is None
    with pytest.raises((FileNotFoundError, ValueError), match=r"metrics\.csv"):
        last_monitored(RunFolder(tmp_path), needed=True)


@pytest.mark.parametrize(
    ("sweeper", "expected"), [({"params": None}, None), ({"trial": None}, None), ({"trial": 3}, 3)]
)
def test_a_job_knows_its_trial(sweeper, expected):
    assert trial_number(OmegaConf.create({"sweeper": sweeper})) == expected


@pytest.mark.parametrize(
    "missing", ["logger.csv=null", "callbacks.metrics=null", "logger", "callbacks", "evaluation=none"]
)
def test_a_run_that_will_have_no_curve_is_refused(missing):
    measured = {"extractor": {}, "metrics": ["fid"]}
    cfg = OmegaConf.create({"logger": {"csv": {}}, "callbacks": {"metrics": {}}, "evaluation": measured})
    check_measured(cfg)
    key, _, value = missing.partition("=")
    OmegaConf.update(cfg, key, {"extractor": None, "metrics": None} if value == "none" else None, merge=False)
    with pytest.raises(ValueError, match=f"with {missing}.* there is no curve"):
        check_measured(cfg)

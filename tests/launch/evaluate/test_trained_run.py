"""Run folders that are damaged, or from elsewhere."""

import pytest
from method_runs import config
from omegaconf import OmegaConf

from launch.evaluate.trained_run import TrainedRun


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The config of a run in the folder where the test is."""
    monkeypatch.chdir(tmp_path)
    return OmegaConf.create(OmegaConf.to_container(config("denoising_student", {}), resolve=True))


@pytest.mark.parametrize("part", ["method", "data", "evaluation.extractor", "method.teacher.network"])
def test_a_foreign_runs_config_runs_nothing(stored, tmp_path, part):
    node = {"_target_": "shutil.copy", "src": "config.yaml", "dst": "copied"}
    OmegaConf.update(stored, part, node, merge=False)
    if part == "method":
        stored.method.name = "denoising_student"
    OmegaConf.save(stored, "config.yaml")
    with pytest.raises(
        ValueError, match=rf"^{part}\._target_=shutil\.copy is not built: a config may name classes of "
    ):
        TrainedRun.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_config_that_lacks_parts_names_them(stored, tmp_path):
    OmegaConf.save(OmegaConf.masked_copy(stored, ["method", "seed", "name"]), "config.yaml")
    with pytest.raises(ValueError, match="/config.yaml lacks data, evaluation; restore or remove it$"):
        TrainedRun.load(tmp_path)

"""middle=search against measurements of students with each level of their own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from matplotlib.image import imread
from omegaconf import OmegaConf

from launch.evaluate import middle, runs
from launch.evaluate.measure import Evaluation
from launch.evaluate.trained_run import TrainedRun, Weights
from launch.run.build import build, build_seeded
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from launch.run.teachers import expand_teachers
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS

CONF = Path(__file__).parents[3] / "conf"
CPU = torch.device("cpu")
WEIGHTS = {"weights": None, "checkpoint": None, "download": False}


def trained(*options: str) -> tuple[TrainedRun, dict]:
    """A run that has begun and learned nothing, and the settings of a small measurement."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*options, "teacher.weights=null", "teacher.network.model_channels=8"])
        expand_teachers(cfg)
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    run = RunFolder(cfg.folder)
    run.claim(OmegaConf.to_container(cfg))
    torch.manual_seed(0)
    student = build_seeded(cfg.method, 0)
    for parameter in student.student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return TrainedRun(run, cfg, student, Weights("raw")), build(cfg.evaluation) | {"num_samples": 30, "blocks": 1}


def test_the_level_that_does_best_by_the_monitoring_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(middle, "LEVELS", (0.2, 3.0, 100.0))  # the last one is above the first evaluation's
    run, settings = trained("method=ect", "method.middle=0.821")
    text = middle.search(run, settings, CPU)
    content = json.loads((run.folder.path / "evaluation/middle.json").read_text())
    assert content["fingerprint"]["seeds"] == [MONITOR_SEEDS, MONITOR_SEEDS + 29]
    values = {entry["level"]: entry["mean"] for entry in content["values"]}
    assert list(values) == [0.2, 0.821, 3.0]
    assert run.method.sampling(2).sigmas[1] == 0.821 == content["trained_with"]
    assert content["best"] == min(values, key=values.get)
    assert len(set(values.values())) == 3
    evaluation = Evaluation(dict(settings), build(run.config.data), CPU, first_seed=MONITOR_SEEDS)
    run.method.chosen_nfe = 2
    for level, value in values.items():
        run.method.middle = [level]
        (record,) = evaluation.student(run.method, run.folder, run.weights)
        assert (record.mean, record.nfe) == (value, 2)
    marked = {line.split()[0]: line for line in text.splitlines()}
    assert "least" in marked[f"{content['best']:g}"]
    assert "the method's" in marked["0.821"]
    assert imread(run.folder.path / "evaluation/middle.png").shape[:2] == (480, 720)


def test_what_can_not_be_searched_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, settings = trained("method=ect")
    with pytest.raises(
        ValueError, match="the least of a distance, which precision is not: metrics=.* fid, kid, w2, mmd"
    ):
        middle.search(run, settings | {"metrics": ["precision"]}, CPU)
    run, settings = trained("method=pretrain")
    run.method.sampler.steps = 1
    with pytest.raises(ValueError, match="steps=2: the student takes 1, and no other number"):
        middle.search(run, settings, CPU)
    run.method.sampling = lambda nfe: replace(run.method.sampler.sampling(), solver="euler")
    with pytest.raises(ValueError, match="is for students that renoise between two evaluations, which pretrain's does"):
        middle.search(run, settings, CPU)
    for name in ("a", "b"):
        run.folder.path.joinpath(f"../{name}").mkdir()
        Path(f"runs/{name}/config.yaml").write_text("")
    with pytest.raises(ValueError, match="nothing was searched; the lines above say why"):
        runs.main(OmegaConf.create({"run": "runs/[ab]", "middle": "search", "steps": None, "device": "cpu"} | WEIGHTS))
    assert "not searched: runs/a/config.yaml is not the config of a run" in capsys.readouterr().out
    options = {"run": "runs/x", "middle": "find", "steps": None, "device": "cpu"}
    with pytest.raises(ValueError, match="middle must be one of None, search, got 'find'"):
        runs.main(OmegaConf.create(options))

"""Sweeps whose jobs run elsewhere: hydra/launcher=joblib and, by its local executor, submitit."""

import json

import pytest
from end_to_end_tools import PRETRAIN, STUDENT, assert_same_run, read_csv, train
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow  # many processes from the beginning

SHORT = ("callbacks.grid=null",)
TINY = tuple(option for option in STUDENT if not option.startswith("name="))


def runs(folder):
    return {OmegaConf.load(p.parent / "config.yaml").method.lr: p.parent for p in folder.glob("runs/*/metrics.json")}


def test_jobs_at_once_share_what_they_need_and_do_what_one_after_the_other_does(tmp_path):
    """Data set, training pairs, statistics and the teacher's measurement are there for neither when both begin.

    Jobs of several devices are refused, and stop none of the others.
    """
    at_once, in_turn = tmp_path / "at_once", tmp_path / "in_turn"
    sweep = ("-m", *TINY, *SHORT)
    # A forked process waits for joblib's workers for ever.
    ended = train(at_once, *sweep, "method.lr=1e-3,2e-3", "trainer.devices=1,2", "hydra/launcher=joblib", fresh=True)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "Warning" not in ended.err
    assert len(ended.errors) == 2, ended.err
    assert all("trainer.devices=2 under hydra/launcher=joblib" in line for line in ended.errors)
    assert ended.out.count(" failed: trainer.devices=2 under hydra/launcher=joblib") == 2
    train(in_turn, *sweep, "method.lr=1e-3,2e-3", "trainer.devices=1").ok()
    ours, theirs = runs(at_once), runs(in_turn)
    assert ours.keys() == theirs.keys() == {1e-3, 2e-3}
    for lr, path in ours.items():
        assert_same_run(path, theirs[lr])
        command = json.loads((path / "student.json").read_text())["command"]
        assert command.startswith("python train.py batch_size=16 ")
    stores = [sorted(p.relative_to(f) for p in f.glob("data/**/*") if p.is_file()) for f in (at_once, in_turn)]
    assert stores[0] == stores[1]


def test_submitit_runs_two_processes_and_resumes_when_its_job_is_preempted(tmp_path):
    """The signal that SLURM sends before it takes a machine away."""
    spy = ("+callbacks.preempted._target_=end_to_end_spy.Preempted", "+callbacks.preempted.at_step=8")
    options = ("-m", *PRETRAIN, *SHORT, *spy, "trainer.devices=2", "method.lr=choice(1e-3)")
    ended = train(tmp_path, *options, "hydra/launcher=submitit_local").ok()
    assert "Warning" not in ended.err
    (path,) = (tmp_path / "runs").glob("run*/")
    assert (path / "preempted").exists()
    assert f"{path.name}  complete" in ended.out
    assert [int(row["step"]) for row in read_csv(path / "metrics.csv")] == list(range(1, 14))
    (log,) = (tmp_path / "runs/.submitit").glob("*/*.err")
    assert "preempted" in log.read_text()
    assert "Warning" not in log.read_text()

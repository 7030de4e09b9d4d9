"""What Hydra's launchers need of a job."""

import os
import sys

import pytest
import torch
from omegaconf import OmegaConf

from launch.sweep import jobs

JOBLIB = OmegaConf.create(
    {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "n_jobs": 3}
)
SUBMITIT = OmegaConf.create({"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"})
BASIC = OmegaConf.create({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"})


def trainer(devices=1, accelerator="auto"):
    return OmegaConf.create({"devices": devices, "num_nodes": 1, "accelerator": accelerator})


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two of them, of which CUDA_VISIBLE_DEVICES names numbers 4 and 6; returns a function that begins a new worker."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    held = []

    def worker():
        held.append(jobs._gpu)
        monkeypatch.setattr(jobs, "_gpu", None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")

    worker()
    yield worker
    for lock in (*held, jobs._gpu):
        if lock is not None:
            lock.release()


def taken(devices=1):
    with jobs.placed(trainer(devices), JOBLIB):
        return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_worker_of_joblib_keeps_a_gpu_of_its_own(gpus):
    assert [taken(), taken("auto")] == ["4", "4"]
    gpus()
    assert taken() == "6"
    gpus()
    with pytest.raises(ValueError, match=r"n_jobs=3, but the 2 GPUs here are taken .* give n_jobs=2 at most"):
        taken()


def test_a_gpu_is_free_again_when_its_worker_has_ended(gpus):
    assert taken() == "4"
    jobs._gpu.release()
    jobs._gpu = None
    gpus()
    assert taken() == "4"


def test_jobs_on_the_cpu_take_none(gpus):
    with jobs.placed(trainer(accelerator="cpu"), JOBLIB):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_joblib_has_one_device_for_a_job(gpus):
    with pytest.raises(ValueError, match=r"trainer.devices=2 under hydra/launcher=joblib.*submitit_slurm"):
        taken(2)


def test_in_a_worker_the_program_is_train_py_and_slurms_ranks_are_not_lightnings(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    main, argv = sys.modules["__main__"], sys.argv
    specification = main.__spec__
    with jobs.placed(trainer(8), SUBMITIT):
        assert sys.argv[0] == str(jobs._TRAIN)
        assert jobs._TRAIN.is_file()
        assert main.__spec__ is None
        assert os.environ["SLURM_JOB_NAME"] == "interactive"
    assert (sys.argv, main.__spec__, os.environ["SLURM_JOB_NAME"]) == (argv, specification, "train")


def test_without_a_launcher_nothing_changes():
    argv = sys.argv
    with jobs.placed(trainer(8), BASIC):
        assert sys.argv is argv

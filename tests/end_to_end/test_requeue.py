"""SIGUSR1 before the time is up: the run saves, asks for the job again, and the same command ends as if nothing had been."""

import os
import signal
import socket
import stat
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from end_to_end_tools import (
    PRETRAIN,
    ROOT,
    RUN,
    assert_identical,
    assert_same_run,
    in_call,
    read_csv,
    start,
    timeless,
    train,
    with_data,
)

OPTIONS = (*PRETRAIN, "callbacks.checkpoints.every_n_steps=100", "callbacks.requeue.every_n_steps=2")
STEP = "lightning_modules:Pretrain.training_step"
BEFORE = "callbacks.generative_metrics:reference_statistics"
JOB = {"SLURM_JOB_ID": "4711"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(folder, *OPTIONS).ok()
    return folder


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol on PATH that writes down what it is asked."""
    return fake(tmp_path / "bin" / "scontrol", monkeypatch)


def fake(program: Path, monkeypatch, code: int = 0) -> Path:
    asked = program.with_suffix(".asked")
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit {code}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return asked


def in_job(act, **variables):
    """For `before`: the variables of a job, whose processes come from a server with another environment."""
    os.environ.update(variables)
    act()


def signalled(original, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGUSR1)
    return original(*args, **kwargs)


def at(target, number):
    return partial(in_job, partial(in_call, target, number, signalled), **JOB, PATH=os.environ["PATH"])


def test_a_run_is_requeued_and_goes_on_exactly(alone, tmp_path, scontrol):
    """The signal comes in step 7, long before a checkpoint is due; a second one in the final evaluation."""
    with_data(alone, tmp_path)
    ended = train(tmp_path, *OPTIONS, before=at(STEP, 7)).ok()
    assert "runs/run: stopped by SIGUSR1, saved after step 7; SLURM job 4711 is requeued and goes on" in ended.out
    assert scontrol.read_text() == "requeue 4711\n"
    assert timeless(tmp_path / RUN / "checkpoints/last.ckpt")["global_step"] == 7
    ended = train(tmp_path, *OPTIONS, before=at("launch.final:load_student", 1)).ok()
    assert "stopped by SIGUSR1, all that was done is kept" in ended.out
    assert scontrol.read_text() == "requeue 4711\n" * 2
    assert not (tmp_path / RUN / "metrics.json").exists()
    train(tmp_path, *OPTIONS).ok()
    assert_same_run(tmp_path / RUN, alone / RUN)


def test_without_slurm_a_sweep_ends_and_says_how_it_goes_on(alone, tmp_path):
    with_data(alone, tmp_path)
    sweep = ("-m", *(option for option in OPTIONS if option != "name=run"), "seed=0,1")
    ended = train(tmp_path, *sweep, before=partial(in_call, STEP, 3, signalled)).ok()
    assert ended.out.count("stopped by SIGUSR1, saved after step 3; the same command goes on") == 1
    assert "#1" not in ended.out  # the second job wasn't begun
    (first,) = (tmp_path / "runs").glob("*/checkpoints")
    train(tmp_path, *sweep).ok()
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2
    assert_identical(timeless(first / "last.ckpt"), timeless(alone / RUN / "checkpoints/last.ckpt"))


def test_a_job_that_cannot_be_requeued_is_said_so(alone, tmp_path, monkeypatch):
    with_data(alone, tmp_path)
    fake(tmp_path / "bin" / "scontrol", monkeypatch, code=3)
    train(tmp_path, *OPTIONS, before=at(STEP, 1)).refused(
        "runs/run: stopped by SIGUSR1, saved after step 1, but scontrol requeue 4711 failed (exit code 3); submit it again"
    )


def ranks(folder: Path, *arguments: str, start_rank, **variables: str):
    """Two processes as srun starts them, with start_rank(folder, rank) -> before."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    common |= {"SLURM_NODEID": "0", "SLURM_NNODES": "1", "MASTER_ADDR": "127.0.0.1", "PATH": os.environ["PATH"], **JOB}
    running = []
    for rank in (0, 1):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        before = partial(in_job, start_rank(rank), **common, **place)
        running.append(start(folder, "train.py", *arguments, "trainer.devices=2", before=before))
    return [process.wait() for process in running]


def nothing():
    pass


def test_srun_starts_the_processes_and_a_signal_to_one_of_them_is_enough(alone, tmp_path, scontrol):
    """One folder, as of one process; the notice is seen at the next step at which ranks ask each other."""
    with_data(alone, tmp_path)
    left_alone = with_data(alone, tmp_path / "left_alone")
    for end in ranks(left_alone, *OPTIONS, start_rank=lambda rank: nothing):
        end.ok()
    ended = ranks(tmp_path, *OPTIONS, start_rank=lambda rank: partial(in_call, STEP, 5, signalled) if rank else nothing)
    assert [end.code for end in ended] == [0, 0]
    assert ended[0].out.count("saved after step 6; SLURM job 4711 is requeued and goes on") == 1
    assert "SIGUSR1" not in ended[1].out + ended[1].err
    assert scontrol.read_text() == "requeue 4711\n"
    assert timeless(tmp_path / RUN / "checkpoints/last.ckpt")["global_step"] == 6
    for end in ranks(tmp_path, *OPTIONS, start_rank=lambda rank: nothing):
        end.ok()
    assert_same_run(tmp_path / RUN, left_alone / RUN)
    assert len(read_csv(tmp_path / RUN / "metrics.csv")) == 13


def test_srun_starts_a_sweep_job_after_job(alone, tmp_path):
    with_data(alone, tmp_path)
    options = [option for option in OPTIONS if not option.startswith(("name=", "method.kimg="))]
    for end in ranks(tmp_path, "-m", *options, "method.kimg=0.05", "seed=0,1", start_rank=lambda rank: nothing):
        end.ok()
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2


def test_the_processes_of_a_signalled_run_end(alone, tmp_path):
    """The signal goes to the one that the user started, before the first step; the other is ended."""
    with_data(alone, tmp_path)
    options = (*OPTIONS, "trainer.devices=2")
    ended = train(tmp_path, *options, before=partial(in_call, BEFORE, 1, signalled)).ok()
    assert "all that was done is kept; the same command goes on" in ended.out
    assert not [line for line in ended.err.splitlines() if "error" in line.lower()]


def test_a_data_loaders_worker_ignores_the_signal():
    from callbacks.requeue import Notice

    notice = Notice()
    notice.heed(decides=True)
    try:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            os._exit(0 if not notice.given else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        notice.end()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


# -- examples/slurm.sh ------------------------------------------------------------------------------------------------


def test_the_slurm_script_starts_one_process_for_each_gpu(tmp_path):
    script = ROOT / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    for name, body in {
        "srun": 'printf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" "$@"',
        "scontrol": 'echo "${3%%,*}"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "a1,a2", "SLURM_JOB_ID": "31234567", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", script, "method=disback", "name=with space"]
    said = subprocess.run(command, env=job, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        *("a1:19567", "--kill-on-bad-exit=1", "python", "train.py"),
        *("trainer.num_nodes=2", "trainer.devices=8", "method=disback", "name=with space"),
    ]
    directives = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=SIGUSR1@120", "--requeue", "--ntasks-per-node=8", "--gpus-per-node=8"} <= set(directives)
    elsewhere = subprocess.run(command, env=job | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert elsewhere.returncode == 1
    assert f"error: no train.py in {tmp_path}" in elsewhere.stderr

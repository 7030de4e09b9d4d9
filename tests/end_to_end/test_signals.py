"""Signals: a run saves its step and says how it goes on; the same command then ends as if nothing had been."""

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
    STUDENT,
    assert_identical,
    assert_same_run,
    evaluate,
    in_call,
    read_csv,
    start,
    timeless,
    train,
    with_data,
)

from launch.signals import Notice, Stopped

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


def signalled(original, *args, number=signal.SIGUSR1, **kwargs):
    os.kill(os.getpid(), number)
    return original(*args, **kwargs)


def at(target, call, number=signal.SIGUSR1):
    return partial(
        in_job, partial(in_call, target, call, partial(signalled, number=number)), **JOB, PATH=os.environ["PATH"]
    )


def test_a_run_is_requeued_and_goes_on_exactly(alone, tmp_path, scontrol):
    """The signal comes in step 7, long before a checkpoint is due; a second one in the final evaluation."""
    with_data(alone, tmp_path)
    ended = train(tmp_path, *OPTIONS, before=at(STEP, 7)).ok()
    assert "runs/run: stopped by SIGUSR1, saved after step 7; SLURM job 4711 is requeued and goes on" in ended.out
    assert scontrol.read_text() == "requeue 4711\n"
    assert timeless(tmp_path / RUN / "checkpoints/last.ckpt")["global_step"] == 7
    ended = train(tmp_path, *OPTIONS, before=at("launch.run.final:load_student", 1)).ok()
    assert "stopped by SIGUSR1, what is on disk is kept" in ended.out
    assert scontrol.read_text() == "requeue 4711\n" * 2
    assert not (tmp_path / RUN / "metrics.json").exists()
    train(tmp_path, *OPTIONS).ok()
    assert_same_run(tmp_path / RUN, alone / RUN)


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_too_and_say_so(alone, tmp_path, scontrol):
    """Nobody is asked for the job again."""
    with_data(alone, tmp_path)
    for number, step, code, what in (
        (signal.SIGTERM, 4, 143, "stopped by SIGTERM, saved after step 4"),
        (signal.SIGINT, 3, 130, "interrupted, saved after step 7"),  # of the resumed run
    ):
        ended = train(tmp_path, *OPTIONS, before=at(STEP, step, number))
        assert (ended.code, ended.err.count("Traceback")) == (code, 0)
        assert f"runs/run: {what}; the same command goes on" in ended.out.splitlines()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        ended = train(tmp_path, *OPTIONS, before=at("launch.run.final:load_student", 1, number))
        assert (ended.code, ended.err.count("Traceback")) == (code, 0)
        assert "what is on disk is kept; the same command goes on" in ended.out
    train(tmp_path, *OPTIONS).ok()
    assert_same_run(tmp_path / RUN, alone / RUN)
    ended = evaluate(
        tmp_path,
        f"run={RUN}",
        "device=cpu",
        before=at("launch.evaluate.measure:Evaluation.run", 1, signal.SIGINT),
    )
    assert (ended.code, ended.err) == (130, "")
    assert "evaluate: interrupted, what is on disk is kept; the same command goes on" in ended.out
    assert not scontrol.exists()


def interrupted_twice(original, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100)


def test_a_second_ctrl_c_ends_a_step_at_once(alone, tmp_path):
    with_data(alone, tmp_path)
    ended = train(tmp_path, *OPTIONS, before=partial(in_call, STEP, 3, interrupted_twice))
    assert ended.code == 130
    assert "runs/run: interrupted, in the middle of a step, whose work is lost; the same command goes on" in ended.out


@pytest.mark.slow
def test_a_validation_is_left_and_made_again(tmp_path):
    """The first is due at step 4, the last that is made before the signal at step 8; no checkpoint but for them."""
    options = (*STUDENT, "callbacks.checkpoints.every_n_steps=100")
    train(tmp_path / "alone", *options).ok()
    with_data(tmp_path / "alone", tmp_path)
    validation = "lightning_modules:DenoisingStudent.validation_step"
    ended = train(tmp_path, *options, before=partial(in_call, validation, 2, partial(signalled, number=signal.SIGTERM)))
    assert ended.code == 143
    assert timeless(tmp_path / RUN / "checkpoints/last.ckpt")["global_step"] == 8
    train(tmp_path, *options).ok()
    assert_same_run(tmp_path / RUN, tmp_path / "alone" / RUN)


@pytest.mark.slow
def test_without_slurm_a_sweep_ends_and_says_how_it_goes_on(alone, tmp_path):
    with_data(alone, tmp_path)
    sweep = ("-m", *(option for option in OPTIONS if option != "name=run"), "seed=0,1")
    ended = train(tmp_path, *sweep, before=partial(in_call, STEP, 3, partial(signalled, number=signal.SIGTERM)))
    assert ended.code == 143
    assert ended.out.count("stopped by SIGTERM, saved after step 3; the same command goes on") == 1
    assert "interrupted" in ended.out  # the table's word for the first job
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_srun_starts_a_sweep_job_after_job(alone, tmp_path):
    with_data(alone, tmp_path)
    options = [option for option in OPTIONS if not option.startswith(("name=", "method.kimg="))]
    for end in ranks(tmp_path, "-m", *options, "method.kimg=0.05", "seed=0,1", start_rank=lambda rank: nothing):
        end.ok()
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2


@pytest.mark.parametrize(
    "signalled_ranks", [pytest.param((0,), marks=pytest.mark.slow), (1,), pytest.param((0, 1), marks=pytest.mark.slow)]
)
def test_sigterm_to_any_process_of_a_training_ends_all(alone, tmp_path, signalled_ranks):
    with_data(alone, tmp_path)
    stop = partial(in_call, STEP, 5, partial(signalled, number=signal.SIGTERM))
    ended = ranks(tmp_path, *OPTIONS, start_rank=lambda rank: stop if rank in signalled_ranks else nothing)
    assert [end.code for end in ended] == [143, 143]
    assert ended[0].out.count("stopped by SIGTERM, saved after step 6; the same command goes on") == 1
    assert not [line for end in ended for line in end.err.splitlines() if "error" in line.lower()]


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_other_process_of_a_killed_one_says_so_in_one_line(alone, tmp_path, killed):
    with_data(alone, tmp_path)
    die = partial(in_call, STEP, 5, partial(signalled, number=signal.SIGKILL))
    ended = ranks(tmp_path, *OPTIONS, start_rank=lambda rank: die if rank == killed else nothing)
    ended[killed].killed()
    ended[1 - killed].refused("runs/run: another process of this run has ended")


@pytest.mark.slow
def test_the_processes_of_a_signalled_run_end(alone, tmp_path):
    """The signal goes to the one that the user started, before the first step; the other is ended."""
    with_data(alone, tmp_path)
    options = (*OPTIONS, "trainer.devices=2")
    ended = train(tmp_path, *options, before=partial(in_call, BEFORE, 1, signalled)).ok()
    assert "what is on disk is kept; the same command goes on" in ended.out
    assert not [line for line in ended.err.splitlines() if "error" in line.lower()]


def to_child(number, original, *args, **kwargs):
    """The rank that Lightning started, while this one is busy with something else."""
    (child,) = Path("/proc/self/task").glob(f"{os.getpid()}/children")
    for pid in child.read_text().split():
        if b"train_ddp_process_1" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), number)
    time.sleep(100)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, 1, "error: runs/run: another process of this run failed: rank 1 (killed by SIGKILL)"),
        (signal.SIGTERM, 143, "runs/run: stopped by SIGTERM, what is on disk is kept; the same command goes on"),
    ],
)
@pytest.mark.slow  # two processes from the beginning, and ten seconds until they are not waited for any more
def test_a_process_ends_soon_after_one_that_it_started(alone, tmp_path, number, code, said):
    """Though it is in no collective, which would fail."""
    with_data(alone, tmp_path)
    options = (*OPTIONS, "trainer.devices=2")
    ended = train(
        tmp_path, *options, before=partial(in_call, "launch.run.final:load_student", 1, partial(to_child, number))
    )
    assert ended.code == code
    assert said in (ended.out + ended.err).splitlines()


@pytest.mark.slow  # as the one before
def test_a_process_ends_soon_after_the_one_that_started_it(alone, tmp_path):
    with_data(alone, tmp_path)
    options = (*OPTIONS, "trainer.devices=2")
    running = start(
        tmp_path, "train.py", *options, before=partial(in_call, STEP, 5, partial(signalled, number=signal.SIGKILL))
    )
    running.wait().killed()
    limit = time.monotonic() + 30
    while "error: " not in running.err.read_text() and time.monotonic() < limit:
        time.sleep(0.1)
    assert running.err.read_text().count("error: runs/run: ") == 1
    assert "Traceback" not in running.err.read_text()


def test_a_signal_in_a_finaliser_is_not_lost():
    """Python lets no exception out of one."""
    notice = Notice()

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(Stopped), notice.catching_signals(decides=True):
        thing = Finalised()
        del thing
        time.sleep(20)
    assert notice.code == 143


def soon():
    import launch.run.strategies

    launch.run.strategies.LINE_SECONDS = 0.2


@pytest.mark.slow
def test_who_waits_for_other_machines_says_so_and_can_be_ended(alone, tmp_path):
    """In a call that no signal interrupts."""
    with_data(alone, tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    before = partial(in_job, soon, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    running = start(tmp_path, "train.py", *OPTIONS, "trainer.num_nodes=2", before=before)
    limit = time.monotonic() + 60
    while "waiting" not in running.err.read_text() and time.monotonic() < limit:
        time.sleep(0.1)
    where = f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}, NODE_RANK=0"
    assert f"waiting for the 2 processes of trainer.num_nodes=2 machines ({where}): start" in running.err.read_text()
    os.kill(running.process.pid, signal.SIGINT)
    ended = running.wait()
    assert (ended.code, ended.err.count("Traceback")) == (130, 0)
    assert "runs/run: interrupted, what is on disk is kept; the same command goes on" in ended.out


def test_other_processes_forked_from_this_one_take_signals_as_ever():
    """A data loader's worker: it ends with the process it works for, but not by the terminal's Ctrl-C."""
    notice = Notice()
    with notice.catching_signals(decides=True):
        for number, status in ((signal.SIGUSR1, 0), (signal.SIGINT, 0), (signal.SIGTERM, signal.SIGTERM)):
            child = os.fork()
            if not child:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
                os._exit(0 if notice.given is None else 1)
            assert os.waitpid(child, 0)[1] == status
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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

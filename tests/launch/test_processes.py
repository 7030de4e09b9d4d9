import subprocess
import sys
from types import SimpleNamespace

import pytest

from launch.names import run_name
from launch.processes import children_ended, choose_strategy, process_count


@pytest.mark.parametrize(
    ("devices", "nodes", "count"),
    [(1, 1, 1), (2, 1, 2), ("2", 2, 4), ([0, 3], 1, 2), ("0,1,2", 1, 3), ("auto", 1, 1)],
)
def test_processes_are_counted(devices, nodes, count):
    assert process_count(devices, nodes, "cpu") == count


@pytest.mark.parametrize("devices", [0, -2, [], None, "", "x", "1,", 2.5])
def test_impossible_devices_are_refused(devices):
    with pytest.raises(ValueError, match=r"trainer.devices=.*: give a positive number"):
        process_count(devices, 1, "cpu")


def test_impossible_nodes_are_refused():
    with pytest.raises(ValueError, match="trainer.num_nodes must be an integer of at least 1, got 'x'"):
        process_count(1, "x", "cpu")


def test_the_strategy_is_chosen_once():
    assert choose_strategy("auto", 1) == "auto"
    assert choose_strategy("auto", 8) == "ddp_find_unused_parameters_true"
    assert choose_strategy("ddp", 8) == "ddp"


@pytest.fixture
def launcher():
    """As Lightning's: it makes its list of processes when it launches."""
    launcher = SimpleNamespace(procs=[])
    yield launcher
    for child in launcher.procs:
        child.kill()


def child(launcher, code):
    launcher.procs = [subprocess.Popen([sys.executable, "-c", code])]
    return launcher.procs[0]


def test_children_are_waited_for(launcher):
    with children_ended(launcher):
        process = child(launcher, "import time; time.sleep(0.3)")
    assert process.returncode == 0
    assert launcher.procs == []


def test_children_of_a_failed_job_are_ended(launcher):
    with pytest.raises(ValueError, match="mine"), children_ended(launcher):
        process = child(launcher, "import time; time.sleep(60)")
        raise ValueError("mine")
    assert process.returncode == -9
    assert launcher.procs == []


def test_a_child_that_failed_alone_is_no_success(launcher):
    with (
        pytest.raises(ChildProcessError, match=r"see its message above: rank 1 \(exit code 3\)"),
        children_ended(launcher),
    ):
        child(launcher, "raise SystemExit(3)")
    assert launcher.procs == []


def test_a_child_that_failed_is_the_cause_of_a_broken_collective(launcher):
    with pytest.raises(ChildProcessError, match="rank 1"), children_ended(launcher):
        child(launcher, "raise SystemExit(3)").wait()
        raise RuntimeError("connection closed by peer")


def test_one_process_has_no_children():
    with children_ended(None):
        pass


def test_long_names_are_cut_and_stay_different():
    options = [",".join(f"method.option{i}={value}" for i in range(40)) for value in (1, 2)]
    names = [run_name("run", option) for option in options]
    assert names[0] != names[1]
    assert all(len(name) < 150 for name in names)


def test_sweep_folders_hold_what_the_name_does_not():
    assert run_name("pretrain-digits-seed1", "") == "pretrain-digits-seed1"
    assert run_name("pretrain-digits-seed1", "method.lr=1e-05,trainer/x=a b") == (
        "pretrain-digits-seed1-method.lr-1e-05-trainer-x-a-b"
    )

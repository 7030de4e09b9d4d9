import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from launch.process_environment import is_rank_zero
from launch.run.names import run_name
from launch.run.processes import check_present, children_ended, choose_strategy, find_each_other, process_count
from launch.run.strategies import AveragedGradients, CountedDDP, check_machines, waiting_line
from launch.signals import Notice, Stopped


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
    assert isinstance(choose_strategy("auto", 8), AveragedGradients)
    assert isinstance(choose_strategy("averaged", 1), AveragedGradients)
    for name, unused in (("ddp", None), ("ddp_find_unused_parameters_true", True)):
        strategy = choose_strategy(name, 2)
        assert isinstance(strategy, CountedDDP)
        assert strategy._ddp_kwargs.get("find_unused_parameters") is unused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dpp", "is unknown"),
        ("fsdp", "is not supported: it cuts one network into pieces"),
        ("deepspeed_stage_2", "is not supported: it takes a single optimiser"),
        ("ddp_spawn", "is not supported: what its processes have learned stays in them"),
        (None, "is unknown"),
    ],
)
def test_other_strategies_are_refused_with_the_choices(name, why):
    with pytest.raises(ValueError, match=f"trainer.strategy={name} {why}") as refused:
        choose_strategy(name, 2)
    assert str(refused.value).endswith("choose auto, averaged, ddp, ddp_find_unused_parameters_true")


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_absent_gpus_are_refused(monkeypatch, accelerator):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=f"trainer.accelerator={accelerator}: torch sees no GPU here"):
        check_present(1, accelerator)
    check_present(2, "cpu")
    check_present(2, "auto")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(
        ValueError, match="trainer.devices=8: this machine has 4 GPUs; use trainer.devices=auto for all"
    ):
        check_present(8, accelerator)
    check_present([0, 3], accelerator)
    check_present(8, "cpu")


# -- started by others ------------------------------------------------------------------------------------------------

SRUN = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}


@pytest.fixture
def started(monkeypatch):
    def by(**variables):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)

    return by


def test_srun_gives_ranks(started):
    started(**SRUN, SLURM_PROCID="2", SLURM_JOB_ID="1234567")
    environment = find_each_other(4)
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert (environment.global_rank(), environment.local_rank(), environment.world_size()) == (2, 1, 4)
    assert environment.main_port == 15000 + 4567
    environment.validate_settings(num_devices=2, num_nodes=2)
    assert not is_rank_zero()
    started(SLURM_PROCID="0")
    assert is_rank_zero()


def test_torchrun_gives_ranks(started):
    """The first process of the second machine has local rank 0, and is not rank zero."""
    started(**TORCHRUN, RANK="2", LOCAL_RANK="0")
    assert isinstance(find_each_other(4), TorchElasticEnvironment)
    assert not is_rank_zero()
    started(RANK="0")
    assert is_rank_zero()


def test_another_number_of_started_processes_is_refused(started):
    started(**SRUN, SLURM_PROCID="0")
    for count in (1, 8):
        with pytest.raises(ValueError, match=f"srun started 4 processes, but .* is {count}: make them equal"):
            choose_strategy("auto", count)
    started(**TORCHRUN, RANK="0", LOCAL_RANK="0")
    with pytest.raises(ValueError, match="torchrun started 4 processes, but"):
        choose_strategy("auto", 1)


def test_several_machines_need_an_address(started):
    started()
    check_machines(1)
    with pytest.raises(
        ValueError, match="trainer.num_nodes=2 needs MASTER_ADDR and MASTER_PORT: start the same command"
    ):
        check_machines(2)
    started(MASTER_ADDR="10.0.0.1")
    with pytest.raises(ValueError, match="trainer.num_nodes=2 needs MASTER_PORT: "):
        check_machines(2)
    started(MASTER_ADDR="10.0.0.1", MASTER_PORT="2000", NODE_RANK="1")
    check_machines(2)
    assert (
        "4 processes of trainer.num_nodes=2 machines (MASTER_ADDR=10.0.0.1, MASTER_PORT=2000, NODE_RANK=1): start"
        in (waiting_line(2, 2))
    )
    started(**SRUN, SLURM_PROCID="3")
    check_machines(2)


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_JOB_NAME": "interactive"}])
def test_a_single_task_starts_its_own_processes(started, change):
    started(**SRUN | change, SLURM_PROCID="0")
    assert isinstance(find_each_other(2), LightningEnvironment)
    assert is_rank_zero()
    started(LOCAL_RANK="1")
    assert not is_rank_zero()


@pytest.fixture
def launcher():
    """As Lightning's: it makes its list of processes when it launches."""
    launcher = SimpleNamespace(children=[])
    yield launcher
    for child in launcher.children:
        child.kill()


def child(launcher, code):
    launcher.children = [subprocess.Popen([sys.executable, "-c", code])]
    return launcher.children[0]


def test_children_are_waited_for(launcher):
    with children_ended(launcher):
        process = child(launcher, "import time; time.sleep(0.3)")
    assert process.returncode == 0
    assert launcher.children == []


def test_children_of_a_failed_job_are_ended(launcher):
    with pytest.raises(ValueError, match="mine"), children_ended(launcher):
        process = child(launcher, "import time; time.sleep(60)")
        raise ValueError("mine")
    assert process.returncode == -9
    assert launcher.children == []


def test_a_child_that_failed_alone_is_no_success(launcher):
    with (
        pytest.raises(ChildProcessError, match=r"see its message above: rank 1 \(exit code 3\)"),
        children_ended(launcher),
    ):
        child(launcher, "raise SystemExit(3)")
    assert launcher.children == []


@pytest.mark.parametrize(("code", "number"), [("143", signal.SIGTERM), ("130", signal.SIGINT)])
def test_a_child_that_a_signal_ended_ends_the_run_in_order(launcher, monkeypatch, code, number):
    monkeypatch.setattr("launch.run.processes.NOTICE", notice := Notice())
    with pytest.raises(Stopped), children_ended(launcher):
        child(launcher, f"raise SystemExit({code})").wait()
    assert notice.given == number


def test_a_child_that_failed_is_the_cause_of_a_broken_collective(launcher):
    with pytest.raises(ChildProcessError, match="rank 1"), children_ended(launcher):
        child(launcher, "raise SystemExit(3)").wait()
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")


def test_an_error_of_its_own_is_not_waited_with(launcher):
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"), children_ended(launcher):
        child(launcher, "import time; time.sleep(60)")
        raise RuntimeError("out of memory")
    assert time.monotonic() - begun < 10


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

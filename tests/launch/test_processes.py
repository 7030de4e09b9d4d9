import pytest

from launch.names import run_name
from launch.processes import choose_strategy, process_count


@pytest.mark.parametrize(
    ("devices", "nodes", "count"),
    [(1, 1, 1), (2, 1, 2), ("2", 2, 4), ([0, 3], 1, 2), ("0,1,2", 1, 3), ("auto", 1, 1)],
)
def test_processes_are_counted(devices, nodes, count):
    assert process_count(devices, nodes, "cpu") == count


@pytest.mark.parametrize("devices", [0, -2, [], None, ""])
def test_impossible_devices_are_refused(devices):
    with pytest.raises(ValueError, match=r"trainer.devices=.*: give a positive number"):
        process_count(devices, 1, "cpu")


def test_the_strategy_is_chosen_once():
    assert choose_strategy("auto", 1) == "auto"
    assert choose_strategy("auto", 8) == "ddp_find_unused_parameters_true"
    assert choose_strategy("ddp", 8) == "ddp"


def test_sweep_folders_hold_what_the_name_does_not():
    assert run_name("pretrain-digits-seed1", "") == "pretrain-digits-seed1"
    assert run_name("pretrain-digits-seed1", "method.lr=1e-05,trainer/x=a b") == (
        "pretrain-digits-seed1-method.lr-1e-05-trainer-x-a-b"
    )

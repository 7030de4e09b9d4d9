"""A run's folder that can't be made or written to: one line, and nothing is touched."""

import pytest
from end_to_end_tools import PRETRAIN, snapshot, train

WAY_OUT = ["move away what is in its place", "choose another name=..."]


def runs_is_a_file(folder):
    (folder / "runs").write_text("mine")


def the_run_is_a_file(folder):
    (folder / "runs").mkdir()
    (folder / "runs" / "run").write_text("mine")


def runs_takes_nothing(folder):
    """As a read-only disk, for root too."""
    (folder / "runs").symlink_to("/proc/sys")


def its_checkpoints_are_a_file(folder):
    (folder / "runs" / "run").mkdir(parents=True)
    (folder / "runs" / "run" / "checkpoints").write_text("mine")


def its_config_is_a_folder(folder):
    (folder / "runs" / "run" / "config.yaml").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (runs_is_a_file, ["the folder runs/run can't be made (Not a directory)", *WAY_OUT]),
        (the_run_is_a_file, ["the folder runs/run can't be made (File exists)", *WAY_OUT]),
        (runs_takes_nothing, ["the folder runs/run can't be made (No such file or directory)", *WAY_OUT]),
        (its_config_is_a_folder, ["cannot write runs/run/config.yaml: it is a folder"]),
        (
            its_checkpoints_are_a_file,
            ["cannot write runs/run/checkpoints/last.ckpt: Not a directory", "choose another place"],
        ),
    ],
)
def test_a_folder_that_cannot_be_the_runs(tmp_path, prepare, message):
    prepare(tmp_path)
    before = snapshot(tmp_path)
    train(tmp_path, *PRETRAIN).refused(*message)
    assert before.items() <= snapshot(tmp_path).items()

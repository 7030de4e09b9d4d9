import io

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import callbacks.loggers.event_files
from callbacks import TensorBoard


def logger(folder):
    return TensorBoard(folder, name="", version="")


def shown(folder):
    """[(step, value)] of the loss, as TensorBoard shows it."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("loss/student")]


def test_a_resumed_run_shows_each_step_once_and_a_kill_loses_none(tmp_path):
    """Killed after step 7 (no file is closed), and resumed behind step 3."""
    killed = logger(tmp_path)
    for step in range(8):
        killed.log_metrics({"loss/student": 10.0 + step}, step)
    resumed = logger(tmp_path)
    for step in range(4, 10):
        resumed.log_metrics({"loss/student": 20.0 + step, "epoch": 0}, step)
    assert shown(tmp_path) == [(step, 10.0 + step) for step in range(4)] + [
        (step, 20.0 + step) for step in range(4, 10)
    ]


def test_a_run_that_is_resumed_in_a_validation_keeps_the_row_of_its_step(tmp_path):
    """metrics.csv has it, and it is never logged again."""
    folder = tmp_path / "tensorboard"
    killed = logger(folder)
    for step in range(5):
        killed.log_metrics({"loss/student": 10.0 + step}, step)
    (tmp_path / "metrics.csv").write_text("step,nimg,loss/student,heldout/loss\n4,64,13.0,\n5,80,14.0,\n")
    resumed = logger(folder)
    resumed.log_metrics({"heldout/loss": 7.0}, 4)
    resumed.log_metrics({"loss/student": 15.0}, 5)
    assert shown(folder) == [(step, 10.0 + step) for step in range(6)]


def test_pictures_are_written_too(tmp_path):
    made = logger(tmp_path)
    made.experiment.add_image("samples", np.zeros((4, 4, 3), np.uint8), 3, dataformats="HWC")
    made.finalize("success")
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [event.step for event in found.Images("samples")] == [3]


class Filling(io.RawIOBase):
    """A file on a disk that takes `room` bytes."""

    def __init__(self, path, room):
        self.file, self.room = path.open("wb", buffering=0), room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.loggers.event_files, "open_unbuffered", lambda path: Filling(path, 200))
    made = logger(tmp_path)
    with pytest.raises(
        OSError, match=rf"cannot write TensorBoard's file in {tmp_path}: No space left on device. Make room"
    ):
        for step in range(9):
            made.log_metrics({"loss/student": 1.0}, step)
    made.finalize("failed")
    assert len(shown(tmp_path)) == step

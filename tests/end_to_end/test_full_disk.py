"""A disk that is full while a run trains: one line, nothing lost, and the same command goes on."""

import errno
import io
import os
from functools import partial

import pytest
from end_to_end_tools import PRETRAIN, RUN, find, read_checkpoint, train


class Filling(io.FileIO):
    """A file that meets a full disk after so many bytes."""

    room = 2500

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def filling(target):
    owner, name = find(target)
    setattr(owner, name, lambda path: Filling(path, "wb"))


@pytest.mark.slow
def test_of_tensorboard(tmp_path):
    options = (*PRETRAIN, "callbacks.grid=null")
    ended = train(tmp_path, *options, before=partial(filling, "callbacks.loggers.event_files:open_unbuffered"))
    ended.refused(f"cannot write TensorBoard's file in {RUN}/tensorboard: No space left on device", "run again")
    assert read_checkpoint(tmp_path / RUN / "checkpoints/last.ckpt")["global_step"] >= 3
    train(tmp_path, *options).ok()

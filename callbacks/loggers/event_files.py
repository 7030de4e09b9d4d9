"""TensorBoard's files, written at once and without a thread: torch's writer has one whose errors reach nobody."""

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter


class EventFile:
    """A new file of events in `folder`; its first event drops what earlier files have from its step on.

    So a resumed run shows each step once. Nothing is buffered: a kill loses nothing, and a full disk is noticed here.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"  # read in this order
        self._file = open_unbuffered(self._folder / name)
        self._begun = False
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Write an event.

        Raises:
            OSError: naming the folder, where the disk refuses.
        """
        if not self._begun:
            self._begun = True
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=event.wall_time, step=event.step, session_log=start))
        self._write(event)

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        left = record.getvalue()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write TensorBoard's file in {self._folder}: {error.strerror}. Make room and run again",
            ) from error

    def flush(self) -> None:
        """Nothing: all is written."""

    def close(self) -> None:
        self._file.close()


def open_unbuffered(path: Path) -> io.RawIOBase:
    return path.open("wb", buffering=0)


class EventFiles(SummaryWriter):
    """torch's writer on an `EventFile`."""

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = FileWriter.__new__(FileWriter)  # whose constructor would start the thread
            self.file_writer.event_writer = EventFile(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer

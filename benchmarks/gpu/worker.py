"""A process that measures, so that a crash, a hang or a broken CUDA context costs one entry and not the run."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import ROOT
from launch.errors import one_line, out_of_memory, quiet

PASSED, FAILED, NO_MEMORY, REFUSED, TOO_SLOW = "passed", "failed", "out of memory", "refused", "too slow"
Row = dict[str, Any]

# After these every CUDA call of the process fails.
_BROKEN = ("device-side assert", "illegal memory access", "illegal instruction", "misaligned address", "launch failure")
_LETTERS = 300  # of an error's message
_PATIENCE = 20.0  # seconds for a killed process to go, which a driver may hold
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class Refused(Exception):
    """What is asked for is refused by design; the message says why."""


class Worker:
    """A process that is started when it is needed, and anew after one that died, hung or lost its CUDA context.

    It has a process group of its own, whose processes end with it. What it prints goes into `log`.

    Attributes:
        start_method: "fork", in a moment, from a process that has imported everything and has touched no GPU; "spawn" imports
            everything again.
    """

    def __init__(self, log: Path):
        self.log, self.start_method = log, "fork"
        self._process: Any = None

    def call(self, function: Callable[..., Row], *arguments: Any, seconds: float) -> Row:
        """The row that `attempt` makes of the call, or one of a process that died or took longer than `seconds`."""
        self._start()
        begun = time.monotonic()
        self._connection.send((function, arguments))
        try:
            if not self._connection.poll(max(0.0, seconds)):
                self.stop()
                return {"status": TOO_SLOW, "message": f"stopped after {time.monotonic() - begun:.0f} s"}
            row, healthy = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = ", as the system does where memory is short" if code == -signal.SIGKILL else ""
            return {"status": FAILED, "error": "ProcessEnded", "message": f"the process ended by {ended}{hint}"}
        if not healthy:
            self.stop()
        return row

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context(self.start_method)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self.log)))
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # it has gone, or has not yet a group of its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(_PATIENCE)
        self._connection.close()
        self._process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def die_with_parent() -> None:
    """End this process with the one that started it, where the system can: a killed parent's must not go on using the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _serve(connection: Any, log: str) -> None:
    os.setpgid(0, 0)
    die_with_parent()
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    quiet()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        row, healthy = attempt(function, *arguments)
        if healthy:
            _free_memory()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.send((row, healthy))


def attempt(function: Callable[..., Row], *arguments: Any) -> tuple[Row, bool]:
    """The function's figures with the status and seconds of the call, or the row of its error; and whether the GPU answers."""
    begun = time.monotonic()
    healthy = True
    try:
        row = {"status": PASSED, **function(*arguments)}
    except Refused as reason:
        row = {"status": REFUSED, "message": one_line(reason)[:_LETTERS]}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        row = failure(error)
        healthy = not context_broken(error)
    return row | {"wall_seconds": round(time.monotonic() - begun, 2)}, healthy


def failure(error: BaseException) -> Row:
    """The row of an error: its type, the message in one line, and the last line of our code that it went through."""
    innermost = error
    while innermost.__cause__ is not None:  # which Hydra and the compiler wrap
        innermost = innermost.__cause__
    where = _last_frame(innermost) or _last_frame(error)
    known = isinstance(error, Exception)
    return {
        "status": NO_MEMORY if known and out_of_memory(error) else FAILED,
        "error": type(innermost).__name__,
        "message": (one_line(error) if known else f"exit code {error}")[:_LETTERS],
        "where": where,
    }


def _last_frame(error: BaseException) -> str | None:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(f"{ROOT}{os.sep}") and "site-packages" not in frame.filename
    ]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} in {frames[-1].name}" if frames else None


def context_broken(error: BaseException) -> bool:
    """Whether a fresh process is needed: after some errors no CUDA call of this one succeeds."""
    if any(words in str(error) for words in _BROKEN):
        return True
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def _free_memory() -> None:
    gc.collect()  # trainers and methods hold each other
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # each entry compiles for itself, from the caches on disk
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

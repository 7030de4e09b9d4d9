"""Signals that end a program in order: it says in one line how it goes on, and a training saves its step first.

SIGUSR1 comes from SLURM before a job's time is up: the job is handed back. SIGTERM comes from schedulers and `kill`, SIGINT
from Ctrl-C: exit codes 143 and 130, as shells have them.

Without torch, so that it holds from a program's first moment.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from launch.process_environment import is_rank_zero

SIGNALS = (
    signal.SIGUSR1,
    signal.SIGTERM,
    signal.SIGINT,
)  # where ranks were given different ones, the first of them counts
PATIENCE = 90  # seconds until a checkpoint must be written, of the 120 that examples/slurm.sh gives; else an older one has to do
_APART = 1  # seconds; one Ctrl-C may come twice, from the terminal and from whoever started the process


class Stopped(BaseException):
    """The run ends here because of a signal. No Exception: nothing on the way may treat it as a failure and go on."""


class Notice:
    """Which of SIGNALS this process was given, and what it may do at once.

    In training the process waits for the end of the step (of several ranks: the next at which they ask each other), but no
    longer than PATIENCE, nor for another signal. Elsewhere (teacher's samples, validation, final evaluation) what is worth
    keeping is on disk, and the process ends at once; but at SIGUSR1 the other ranks follow rank zero, which `decides`.
    """

    def __init__(self) -> None:
        self.given: signal.Signals | None = None
        self.job = "this run"
        self.decides = self.training = False
        self._catching = False
        self._how: str | None = None  # it ends, once it does
        self._process = 0
        self._last = 0.0

    @contextmanager
    def catching_signals(self, decides: bool, job: str = "this run") -> Iterator[None]:
        """Within the block the signals give notice. Only the main thread can take them.

        Raises:
            Stopped: Also at once where notice was given before.
        """
        outer = self.job, self.decides, self._catching, self._process
        here = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM) if here}
        self.job, self.decides, self.training, self._catching, self._process = job, decides, False, True, os.getpid()
        for number in handlers:
            signal.signal(number, self._lose_patience if number == signal.SIGALRM else self._take)
        hook, sys.unraisablehook = sys.unraisablehook, partial(self._swallowed, sys.unraisablehook)
        try:
            self.end_if_given()
            yield
        finally:
            sys.unraisablehook = hook
            if handlers:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.job, self.decides, self._catching, self._process = outer
            self.training = False

    @property
    def code(self) -> int:
        """Exit code of a process that ends for what it was given."""
        return 0 if self.given in (None, signal.SIGUSR1) else 128 + self.given

    def follow(self, codes: Sequence[int]) -> None:
        """End this process where a signal ended another process of the run.

        Raises:
            Stopped: Where a signal ended another process of this run, as its exit code says.
        """
        if number := stopped_by(codes):
            self.given = self.given or number
            self._end("what is on disk is kept")

    def end_if_given(self) -> None:
        if self.given and self._catching and not self.training and (self.decides or self.given != signal.SIGUSR1):
            self._end("what is on disk is kept")

    def end_now(self, number: int) -> None:
        """End the process from another thread, with the line: the main thread is in a call that hears no signal."""
        self.given = self.given or signal.Signals(number)
        code = self.code
        if self.decides:
            code = _said(self.job, "what is on disk is kept")
        os._exit(code)

    def _take(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:  # a data loader's worker, say, which has inherited this
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.given is None:
            self.given, self._last = signal.Signals(number), now
            if self.decides:
                signal.alarm(PATIENCE)
            self.end_if_given()
        elif number != signal.SIGUSR1 and now - self._last > _APART:
            self._last = now
            if self._how:  # somebody does not want to wait for the cleaning up either
                os._exit(self.code or 1)
            self._end("in the middle of a step, whose work is lost")

    def _lose_patience(self, *_: Any) -> None:
        if os.getpid() == self._process:
            signal.alarm(PATIENCE)  # should something on the way swallow this one
            self._end(self._how or f"in a step of more than {PATIENCE} s, whose work is lost")

    def _end(self, how: str) -> None:
        self._how = how
        raise Stopped(how)

    def _swallowed(self, hook: Callable[[Any], None], unraisable: Any) -> None:
        """Where the signal came in a finaliser, or in a weak reference's callback, nothing passes on: again, outside of it."""
        if issubclass(unraisable.exc_type, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(unraisable)


NOTICE = Notice()


@contextmanager
def stoppable(job: str) -> Iterator[None]:
    """Within the block a signal ends the process in order; rank zero says how `job` goes on.

    The exit code of SIGUSR1 is 0, or 1 where SLURM didn't requeue the job. A sweep ends too: the same command goes on with
    its unfinished jobs.
    """
    decides = is_rank_zero()
    try:
        with NOTICE.catching_signals(decides, job):
            yield
    except Stopped as end:
        sys.exit(_said(job, str(end)) if decides else NOTICE.code)
    except Exception:
        if decides or not NOTICE.given:
            raise
        sys.exit(NOTICE.code)  # rank zero has ended by then, and a collective failed


def stopped_by(codes: Sequence[int | None]) -> signal.Signals | None:
    """Which signal ended the first of the processes with these exit codes that one ended in order."""
    return next((number for code in codes for number in SIGNALS[1:] if code in (128 + number, -number)), None)


def _said(job: str, how: str) -> int:
    """The exit code, after a line."""
    interrupted = NOTICE.given == signal.SIGINT
    message = f"{job}: {'interrupted' if interrupted else f'stopped by {NOTICE.given.name}'}, {how}"
    number = os.environ.get("SLURM_JOB_ID")
    if NOTICE.given != signal.SIGUSR1 or number is None:
        beside = "\n" * (interrupted and sys.stdout.isatty())  # of the terminal's ^C
        print(f"{beside}{message}; the same command goes on", flush=True)
        return NOTICE.code
    try:
        asked = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True, check=False)
        failure = asked.returncode and (asked.stderr.strip() or f"exit code {asked.returncode}")
    except OSError as error:
        failure = error.strerror
    if failure:
        print(f"error: {message}, but scontrol requeue {number} failed ({failure}); submit it again", file=sys.stderr)
        return 1
    print(f"{message}; SLURM job {number} is requeued and goes on", flush=True)
    return 0

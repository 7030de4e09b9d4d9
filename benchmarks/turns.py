"""Programs that take turns: each makes an update while the others wait, so that all meet the same machine.

A program runs in a process of its own, which `Turns` stands in: a line on its standard input is its turn, a line of JSON its
answer. `Program` is the other end.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measuring import ROOT, clock, peak_memory

CYCLE = ("fake", "generator")  # the updates of DMD2 that are measured, a turn each
_PATIENCE = 30  # seconds in which a program ends by itself


def update_options() -> argparse.ArgumentParser:
    """What a measured program of DMD2's updates is told on its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--gan", action="store_true")
    return parser


class Turns:
    """In a measured program: waits for its turns and answers; what else it prints goes to standard error.

    Args:
        device: Where it computes, for the clock.
        threads: Of its computations, each on a core of its own; all programs share the same ones.
    """

    def __init__(self, device: str, threads: int):
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.device = device
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        torch.set_num_threads(threads)

    def ready(self, **facts: Any) -> None:
        """Say what will be measured, after everything has been built, and wait for the first turn."""
        self._answer(torch=torch.__version__, **facts)
        self._wait()

    def made(self, update: str) -> None:
        """Answer that the turn's update is done, and wait for the next turn; the process ends where there is none."""
        self._answer(update=update, seconds=clock(self.device) - self._begun, peak_gib=self._peak() / 2**30)
        self._wait()

    def _answer(self, **content: Any) -> None:
        print(json.dumps(content), file=self._answers)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self._begun = clock(self.device)

    def _peak(self) -> int:
        cuda = torch.device(self.device).type == "cuda"
        return torch.cuda.max_memory_allocated() if cuda else peak_memory()


class Program:
    """A measured program, as its process is started; leaving the `with` block ends it.

    Args:
        name: In messages.
        command: Of a program that `Turns` stands in.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def facts(self) -> dict[str, Any]:
        """What the program says before its first turn, once.

        Raises:
            RuntimeError: Where it has ended.
        """
        return self._read()

    def turn(self) -> dict[str, Any]:
        """Let the program make its next update: {"update": kind, "seconds": of it, "peak_gib": of memory so far}.

        Raises:
            RuntimeError: Where it has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # the reading says so
            print("go", file=self._process.stdin)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended with exit code {self._process.wait()}: its last lines are above")
        return json.loads(line)

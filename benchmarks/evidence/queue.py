"""Commands in an order, some at once, within a limit of time: a second call goes on where the time of the first one ended."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.gpu.stages import NOT_REACHED, Budget
from benchmarks.gpu.worker import FAILED, PASSED, die_with_parent
from benchmarks.measuring import ROOT
from stillhouse.files import write_file, write_json

STOPPED = "stopped"  # by the end of the time; it goes on
_LETTERS = 300  # of an error's line
_POLL = 0.05  # seconds
_LEAST = 20.0  # seconds without which nothing is begun: an import and a first step


@dataclass(frozen=True)
class Job:
    """Commands that are carried out one after the other.

    Attributes:
        name: Unique, and a file's name.
        commands: Of the repository's root, each of which goes on where it was stopped by SIGTERM when it is called again.
        needs: Names of the jobs that must have passed before.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()


@dataclass
class _Running:
    job: Job
    left: list[tuple[str, ...]]
    log: BinaryIO
    process: subprocess.Popen = field(init=False)
    begun: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        command = self.left.pop(0)
        self.log.write(f"$ {shlex.join(command)}\n".encode())
        self.log.flush()
        # With a process group, which is ended as a whole, and not longer there than this process.
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def run_queue(
    jobs: Sequence[Job],
    folder: Path,
    budget: Budget,
    workers: int,
    *,
    retry: bool = False,
    reserve: float = 20.0,
    least: float = _LEAST,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Carry out the jobs that have not passed, in their order, so many at once; each is a row of FOLDER/runs.json.

    Args:
        jobs: In the order of their value; those that are needed stand before those that need them.
        folder: Where rows and logs/JOB.log are written, and rows are sought.
        budget: After which nothing goes on.
        workers: Jobs at once.
        retry: Whether jobs that failed are repeated.
        reserve: Seconds before the end at which what goes on is given SIGTERM; at the end it is killed.
        least: Seconds before that, without which nothing is begun.
        say: Shows a line of progress.

    Returns:
        The rows by the jobs' names.
    """
    stored = read_rows(folder)
    rows = {name: row for name, row in stored.items() if not (retry and row["status"] == FAILED)}
    done = {name for name, row in rows.items() if row["status"] in (PASSED, FAILED)}
    waiting = [job for job in jobs if job.name not in done]
    running: list[_Running] = []
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    say(f"{len(waiting)} of {len(jobs)} runs to do, {workers} at once, in {budget.left():.0f} s")

    def close(run: _Running, status: str, message: str | None = None) -> None:
        running.remove(run)
        run.log.close()
        seconds = time.monotonic() - run.begun
        before = stored.get(run.job.name, {}).get("seconds", 0.0)
        rows[run.job.name] = {"status": status, "seconds": round(before + seconds, 1)}
        if message:
            rows[run.job.name]["message"] = message
        _write(folder, jobs, rows)
        ended = sum(rows.get(job.name, {}).get("status") in (PASSED, FAILED) for job in jobs)
        outcome = f"{status}: {message}" if message else status
        rest = f"{len(running)} running, {budget.left():.0f} s left"
        say(f"[{ended}/{len(jobs)}] {run.job.name} {outcome} ({seconds:.0f} s), {rest}")

    def look() -> None:
        for run in list(running):
            code = run.process.poll()
            if code is None:
                continue
            if code == 0 and run.left:
                run.start()
            elif code == 0:
                close(run, PASSED)
            else:
                close(run, FAILED, _last_line(folder / "logs" / f"{run.job.name}.log", code))

    with _ends_in_order(running):
        while budget.left() > reserve and (running or waiting):
            look()
            passed = {name for name, row in rows.items() if row["status"] == PASSED}
            ready = [job for job in waiting if passed.issuperset(job.needs)]
            if budget.left() < reserve + least:
                ready = []
            for job in ready[: max(0, workers - len(running))]:
                waiting.remove(job)
                run = _Running(job, list(job.commands), open(folder / "logs" / f"{job.name}.log", "ab"))  # noqa: SIM115
                run.start()
                running.append(run)
            if not running and not ready:
                break  # what is left needs what failed, or more time
            time.sleep(_POLL)
        for run in running:
            run.signal(signal.SIGTERM)
        while running and budget.left() > 1:
            for run in list(running):
                if (code := run.process.poll()) is not None:
                    close(run, PASSED if code == 0 and not run.left else STOPPED)
            time.sleep(_POLL)
    for run in list(running):  # killed by now
        close(run, STOPPED, "killed: it was not at its end in time, and goes on from its last checkpoint")
    _write(folder, jobs, rows)
    return rows


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of FOLDER/runs.json that were reached, by their jobs' names."""
    path = folder / "runs.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    return {row.pop("run"): row for row in rows if row["status"] != NOT_REACHED}


def _write(folder: Path, jobs: Sequence[Job], rows: Mapping[str, dict[str, Any]]) -> None:
    listed = {job.name: rows.get(job.name, {"status": NOT_REACHED}) for job in jobs}
    listed |= rows  # of other claims, too
    write_json(folder / "runs.json", {"runs": [{"run": name, **row} for name, row in listed.items()]})
    counts = Counter(row["status"] for row in listed.values())
    lines = [", ".join(f"{count} {status}" for status, count in counts.items()), "", "| run | status | seconds | |"]
    lines += ["|---|---|--:|---|"]
    lines += [
        f"| {name} | {row['status']} | {row.get('seconds', '')} | {row.get('message', '').replace('|', '/')} |"
        for name, row in listed.items()
    ]
    write_file(folder / "report.md", ("\n".join(lines) + "\n").encode())


@contextmanager
def _ends_in_order(running: list[_Running]) -> Any:
    """Within the block SIGTERM is an exit; after it nothing is left running, however it ends."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except BaseException:
        for run in running:
            run.signal(signal.SIGTERM)  # train.py saves where it is
        end = time.monotonic() + 10
        while time.monotonic() < end and any(run.process.poll() is None for run in running):
            time.sleep(_POLL)
        raise
    finally:
        for run in running:
            run.signal(signal.SIGKILL)
            run.process.wait()
        signal.signal(signal.SIGTERM, before)


def _last_line(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = max((index for index, line in enumerate(lines) if line.startswith("$ ")), default=0)
    lines = lines[last:]  # what is above is of other commands, and of an earlier try
    errors = [line for line in lines if line.startswith("error:")]
    return f"exit code {code}, {(errors or lines)[-1][:_LETTERS]}"

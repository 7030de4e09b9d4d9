"""One call of `python -m benchmarks.gpu`: the device's facts, then stage after stage, then the report."""

import argparse
import sys
import time

from benchmarks.gpu import devices
from benchmarks.gpu.all_stages import DRY_SHARES, SHARES
from benchmarks.gpu.report import write_report
from benchmarks.gpu.stages import Budget, Setting, read, run_stages
from benchmarks.gpu.worker import PASSED, Worker

_RESERVE = 3.0  # seconds of the time, for the report and the end of Python
_FACTS = 120.0  # seconds in which a GPU has to answer


def run(options: argparse.Namespace, command: str, begun: float) -> int:
    """Run the stages that are chosen; the exit code.

    Args:
        options: Of the command line.
        command: For the files.
        begun: When the time began, by `time.monotonic()`.
    """
    budget = Budget(60 * options.minutes - (time.monotonic() - begun) - _RESERVE)
    known = {stage.name: stage for stage in SHARES}
    chosen = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in chosen if name not in known]:
        return _refuse(f"--only {','.join(unknown)}: the stages are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with Worker(options.out / "worker.log") as worker:
        machine = worker.call(devices.facts, options.device, seconds=_FACTS)
        if machine["status"] != PASSED and options.device == "cuda":
            # Had something here touched the GPU, no forked process could.
            worker.stop()
            worker.start_method = "spawn"
            machine = worker.call(devices.facts, options.device, seconds=_FACTS)
        if machine.pop("status") != PASSED:
            return _refuse(machine["message"])
        for name in ("wall_seconds", "load"):
            machine.pop(name)
        for name in chosen:
            stored = read(options.out, known[name])
            if stored and (there := _card(stored["machine"])) != _card(machine):
                return _refuse(
                    f"--out {options.out} holds figures of {there}, this is {_card(machine)}: choose another folder"
                )
        setting = Setting(machine["device"], machine["gpus"], machine["peak_tflops"], options.fastgen)
        print(f"{_card(machine)}, torch {machine['torch']}: {budget.left():.0f} s left", flush=True)
        shares = {s: share for s, share in (DRY_SHARES if setting.dry else SHARES).items() if s.name in chosen}
        run_stages(
            shares, setting, machine, options.out, budget, worker, command=command, retry=options.retry, say=_say
        )
    text = write_report(list(known.values()), options.out)
    print(
        f"\n{text}\n{options.out}/report.md and its stages' files are written, {budget.left() + _RESERVE:.0f} s before the end"
    )
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _card(machine: dict) -> str:
    return machine["gpu"] if machine["device"] == "cuda" else machine["cpu"]


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2

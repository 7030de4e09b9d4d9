"""Kills runs at random moments until they complete, and compares them bit for bit with runs that were left alone.

python tests/kill_series.py [METHOD ...] [--kills 8] [--signals KILL,TERM,INT] [--seed 0] [--folder /tmp/kill-series]

A series: the command is started, the signal sent after a random time, and the same command started again, until one of them
ends before its signal. For each method and signal there are series until --kills signals have been sent.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from end_to_end_tools import RUN, TINY, Ended, assert_same_run, find, start, train, with_data

_SHARED = tuple(option for option in TINY if not option.startswith("teacher.weights="))
METHODS = {
    "denoising_student": ["method.pairs=64", "method.held_out=16", "trainer.validate_every_n_steps=4"],
    "disback": ["method=disback", "method.nodes=2", "method.interval=2", "method.fake_updates=1", "method.lr=1e-3"],
    "progressive": ["method=progressive", "method.start_steps=8", "method.lr=2e-5"],
    "sfd": ["method=sfd", "method.lr=2e-5"],
}
METHODS["disback"] += ["method.degradation.steps=8", "method.degradation.lr=1e-3"]
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
GOES_ON = "the same command goes on"


def slowed(seconds: float) -> None:
    """Let each step take so much longer: else most signals meet a process that begins or measures."""
    owner, name = find("lightning_modules:Method.on_train_batch_start")
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, slow)


@dataclass
class Series:
    """signals: how often one was sent. met: where the run stood, by what was in its folder then."""

    signals: int = 0
    met: Counter = field(default_factory=Counter)


def kill_series(
    folder: Path, alone: Path, options: Sequence[str], number: signal.Signals, kills: int, draw: Callable[[], float]
) -> Series:
    """A series in `folder`, of the run that was left alone in `alone`, whose data but for the method's own it has.

    After so many `kills` the command is left alone. draw(): seconds until the signal. Raises
    AssertionError where a command ends otherwise than by the signal, or the run is another one in the end.
    """
    with_data(alone, folder, "trajectories", "degradation", "measured")
    series = Series()
    while True:
        begun = time.monotonic()
        running = start(folder, "train.py", *options, before=partial(slowed, 0.15))
        limit = begun + draw() if series.signals < kills else float("inf")
        while running.code is None and time.monotonic() < limit:
            time.sleep(0.005)
        if running.code is None:
            os.kill(running.process.pid, number)
            series.signals += 1
        ended = running.wait()
        if ended.code == 0:
            ended.ok()
            break
        _check(ended, number)
        series.met[_place(folder)] += 1
    assert_same_run(folder / RUN, alone / RUN)
    return series


def _check(ended: Ended, number: signal.Signals) -> None:
    assert ended.code == CODES[number], f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    assert "Traceback" not in ended.err, ended.err
    if number != signal.SIGKILL:
        assert ended.out.count(GOES_ON) == 1, ended.out


def _place(folder: Path) -> str:
    run = folder / RUN
    if not run.exists():
        return "what comes before the run"
    if (run / "student.safetensors").exists() or (run / "samples.png").exists():
        return "the final evaluation"
    return "training" if (run / "metrics.csv").exists() else "stages or stored samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--signals", default="KILL,TERM,INT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill-series-"))
    teacher = folder / "teacher"
    train(teacher, *TINY, "method=pretrain", "method.lr=1e-3").ok()
    weights = f"teacher.weights={teacher / RUN / 'student.safetensors'}"
    generator, total = random.Random(given.seed), Counter()
    for method in given.methods or METHODS:
        alone, options = folder / method / "alone", (*_SHARED, weights, *METHODS[method])
        begun = time.monotonic()
        with_data(teacher, alone)
        train(alone, *options, before=partial(slowed, 0.15)).ok()
        seconds = time.monotonic() - begun
        for name in given.signals.split(","):
            number = signal.Signals[f"SIG{name}"]
            count, sent, met = 0, 0, Counter()
            while sent < given.kills:
                place = folder / method / f"{name}-{count}"
                shutil.rmtree(place, ignore_errors=True)
                draw = partial(generator.uniform, 0.3, seconds)
                series = kill_series(place, alone, options, number, given.kills - sent, draw)
                count, sent, met = count + 1, sent + series.signals, met + series.met
            total[name] += sent
            places = ", ".join(f"{times} in {what}" for what, times in met.most_common())
            print(f"{method}: {sent} SIG{name} in {count} series, each the same run in the end ({places})", flush=True)
    print(", ".join(f"{times} SIG{name}" for name, times in total.items()), f"in {folder}")


if __name__ == "__main__":
    main()

"""Seconds of DMD2's updates in NVIDIA's FastGen and here, in turns: the same network, batch, precision and threads.

python -m benchmarks.fastgen --fastgen DIR [--gan] [--record] [OPTION=VALUE ...]

DIR is a checkout of FastGen, which takes the package attrs beside ours (benchmarks/fastgen_updates.py). Options of train.py for
ours follow at the end.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.fastgen_updates import check_checkout
from benchmarks.measuring import machine, summary
from benchmarks.methods import CIFAR10
from benchmarks.run import RESULTS, record, table
from benchmarks.turns import CYCLE, Program
from stillhouse.metrics.provenance import revision

_WARMUP = 1  # rounds; the first allocates Adam's averages
_TOLERANCE = (
    1e-5  # of parameters: FastGen's network has a layer of 129 for sCM's uncertainty, which DMD2 does not evaluate
)
_MIX = {"fake": 4, "generator": 1}  # updates of DMD2, as in FastGen's config


def measure(theirs: Program, ours: Program, rounds: int) -> dict[str, Any]:
    """Seconds of each update of both programs, in turns, and in each round ours over theirs.

    Args:
        theirs: Of FastGen.
        ours: Of this framework.
        rounds: Of an update of each kind in both programs, after the first rounds.

    Raises:
        RuntimeError: Where a program ends, or they are not at the same update of the same network.
    """
    programs = {"fastgen": theirs, "ours": ours}
    facts = {name: program.facts() for name, program in programs.items()}
    sizes = [fact["parameters"] for fact in facts.values()]
    if max(sizes) > (1 + _TOLERANCE) * min(sizes):
        raise RuntimeError(f"FastGen and this framework have not the same network: {facts}")
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in CYCLE} for name in programs}
    peaks: dict[str, float] = {}
    for number in range(_WARMUP + rounds):
        for kind in CYCLE:
            for name, program in programs.items():
                made = program.turn()
                if made["update"] != kind:
                    raise RuntimeError(f"{program.name} made the update {made['update']!r} where {kind!r} was due")
                peaks[name] = made["peak_gib"]
                if number >= _WARMUP:
                    seconds[name][kind].append(made["seconds"])
    for updates in seconds.values():
        rows = zip(*(updates[kind] for kind in CYCLE), strict=True)
        updates["mix"] = [
            sum(_MIX[k] * s for k, s in zip(CYCLE, row, strict=True)) / sum(_MIX.values()) for row in rows
        ]
    beside = {}
    for kind in (*CYCLE, "mix"):
        pairs = zip(*(seconds[name][kind] for name in programs), strict=True)
        ratios = {"ratio": summary([ours / theirs for theirs, ours in pairs])}
        beside[kind] = {name: summary(seconds[name][kind]) for name in programs} | ratios
    return {
        "parameters": facts["ours"]["parameters"],
        "torch": {name: fact["torch"] for name, fact in facts.items()},
        "mix": _MIX,
        "beside_fastgen": beside,
        "peak_gib": peaks,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fastgen", description=__doc__.splitlines()[0])
    parser.add_argument("--fastgen", required=True, metavar="DIR", help="a checkout of FastGen")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32-true", "tf32", "bf16-mixed"), action="append", help="repeatable")
    parser.add_argument("--gan", action="store_true", help="with the GAN of each")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of each program, on as many cores that both share")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="also write results/benchmarks-fastgen-MACHINE.json")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of train.py, for ours")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        folder = check_checkout(options.fastgen)
    except ValueError as error:
        parser.error(str(error))
    words = ["DIR" if word == options.fastgen else word for word in given]
    commit = revision()  # before results are written
    here = machine() | {"threads": options.threads}
    print(f"{here['cpu']}, {here['cores']} cores, {here['gpu'] or 'no GPU'}, load {here['load']}", flush=True)
    for precision in options.precision or ("32-true", "bf16-mixed"):
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        what = ["--device", options.device, "--precision", precision, "--batch-size", str(options.batch_size)]
        what += ["--threads", str(options.threads), *(["--gan"] if options.gan else [])]
        their_command = [sys.executable, "-m", "benchmarks.fastgen_updates", "--fastgen", str(folder), *what]
        our_command = [sys.executable, "-m", "benchmarks.diff_instruct_updates", *what, *options.options]
        try:
            with Program("FastGen", their_command) as theirs, Program("this framework", our_command) as ours:
                figures = measure(theirs, ours, options.rounds)
        except RuntimeError as error:
            sys.exit(f"python -m benchmarks.fastgen: {error}")
        name = f"DMD2 {'with' if options.gan else 'without'} a GAN in {precision}"
        result = {
            "title": f"{name}, beside FastGen's: {CIFAR10.title}, random weights",
            "date": when,
            "commit": commit,
            "command": shlex.join(["python", "-m", "benchmarks.fastgen", *words]),
            "machine": here,
            "fastgen": _commit(folder),
            "options": options.options,
            **{name: getattr(options, name) for name in ("device", "threads", "batch_size")},
            "precision": precision,
            **figures,
        }
        print(f"\n{table(result)}", flush=True)
        if options.record:
            print(f"{record({name: result}, RESULTS, 'benchmarks-fastgen')} written", flush=True)


def _commit(folder: Path) -> str | None:
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()

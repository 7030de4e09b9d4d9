"""Trains and measures what the papers' claims need, several runs at once, within some minutes.

python -m benchmarks.evidence --out DIR [--minutes 9] [--workers N] [--data fashion_mnist16|digits] [--only CLAIM,CLAIM]
    [--seeds 0,1,2] [--retry] [--pack FILE.tar.gz] [-- options of train.py]

The same command again goes on where its time ended. Afterwards: python -m results claims results/claims-DATA.json DIR
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_BEGUN = time.monotonic()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from benchmarks.evidence.claims import CLAIMS, DATA

    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the runs' folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends (default: 9; 0: pack alone)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="runs at once")
    parser.add_argument("--data", choices=DATA, default="fashion_mnist16", help="what they are trained on")
    parser.add_argument("--only", metavar="CLAIM,CLAIM", help=f"of {', '.join(claim.name for claim in CLAIMS)}")
    parser.add_argument("--seeds", default="0,1,2", metavar="SEED,SEED", help="of all claims one after the other")
    parser.add_argument("--retry", action="store_true", help="repeat runs that failed, too")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar.gz", help="the finished runs' small files, at the end")
    options = parser.parse_args(given[:cut])
    options.extra = given[cut + 1 :]
    if options.minutes < 0 or options.workers < 1:
        parser.error("--minutes and --workers must be positive")
    known = [claim.name for claim in CLAIMS]
    options.only = options.only.split(",") if options.only else known
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"--only {','.join(unknown)}: the claims are {', '.join(known)}")
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds} must be whole numbers with commas between them")
    return options


def main(argv: Sequence[str] | None = None, begun: float | None = None) -> None:
    begun = time.monotonic() if begun is None else begun
    options = arguments(argv)
    from benchmarks.evidence.jobs import LOCK
    from stillhouse.file_locks import try_lock

    try:
        options.out.mkdir(parents=True, exist_ok=True)
        lock = try_lock(options.out / LOCK, "choose another --out")
    except OSError as error:
        sys.exit(f"error: {error}")
    if lock is None:
        sys.exit(f"error: --out {options.out} is in use by another launch: wait for its end, or choose another folder")
    try:
        _launch(options, begun)
    finally:
        lock.release()


def _launch(options: argparse.Namespace, begun: float) -> None:
    from benchmarks.evidence.jobs import jobs, pack
    from benchmarks.evidence.queue import run_queue
    from benchmarks.gpu.stages import Budget
    from stillhouse.files import write_json

    chosen, stored = {"data": options.data, "options": options.extra}, options.out / "evidence.json"
    if stored.exists() and (there := json.loads(stored.read_text())) != chosen:
        sys.exit(f"error: --out {options.out} has runs of {there}, this command says {chosen}: choose another folder")
    write_json(stored, chosen)
    if options.minutes:
        todo = jobs(options.out, options.data, options.only, options.seeds, options.extra)
        budget = Budget(60 * options.minutes - (time.monotonic() - begun) - (5 if options.pack else 1))
        run_queue(todo, options.out, budget, options.workers, retry=options.retry, say=_say)
    if options.pack:
        _say(f"{options.pack}: {pack(options.out, options.pack) / 2**20:.1f} MiB")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(begun=_BEGUN)

"""Tries and measures everything on a GPU, within some minutes.

python -m benchmarks.gpu --out DIR [--minutes 9] [--device cuda|cpu] [--only STAGE,STAGE] [--retry] [--fastgen DIR]

What is done is in DIR/STAGE.json and DIR/report.md at any time; the same command again goes on with what was not reached.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_BEGUN = time.monotonic()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files are written")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a shrunken dry run")
    parser.add_argument("--only", metavar="STAGE,STAGE", help="these stages alone")
    parser.add_argument("--retry", action="store_true", help="repeat entries that failed, too")
    parser.add_argument("--fastgen", type=Path, metavar="DIR", help="a checkout of NVIDIA's FastGen, to measure beside")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes must be a positive number, got {options.minutes:g}")
    if options.fastgen and not (options.fastgen / "fastgen").is_dir():
        parser.error(f"--fastgen {options.fastgen}: no checkout of FastGen there (no folder fastgen in it)")
    return options


def main(argv: Sequence[str] | None = None, begun: float | None = None) -> None:
    begun = time.monotonic() if begun is None else begun
    options = arguments(argv)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not touch it before processes are forked
    try:
        from benchmarks.gpu.run import run  # takes seconds, which an error in the command need not
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; docs/how_to/gpu.md says what to bring to a bare machine")

    sys.exit(run(options, command, begun))


if __name__ == "__main__":
    main(begun=_BEGUN)

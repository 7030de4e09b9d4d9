"""DMD2's updates in NVIDIA's FastGen and here, in turns on one GPU: the same network, batch and precision."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import fastgen
from benchmarks.gpu.stages import Entry, Setting, Stage
from benchmarks.gpu.worker import PASSED, Row
from benchmarks.measuring import spread
from benchmarks.turns import Program

_BATCH, _THREADS, _ROUNDS = 128, 4, 12
_DRY_BATCH, _DRY_ROUNDS = 2, 1


def entries(setting: Setting) -> Iterator[Entry]:
    """In bfloat16 as both come, ours compiled, with the GANs, then in float32."""
    batch = _DRY_BATCH if setting.dry else _BATCH
    compiled = [] if setting.dry else [True]
    for precision in ("bf16-mixed", "32-true") if setting.dry else ("bf16-mixed", "tf32", "32-true"):
        for gan in (False, True):
            for compile in (False, *compiled):
                form = f"{precision}{', GAN' if gan else ''}{', ours compiled' if compile else ''}"
                options = {"batch_size": batch, "precision": precision, "gan": gan, "compile": compile}
                yield Entry(f"DMD2, cifar10, batch {batch}, {form}", options, limit=180, least=60 if compile else 30)


def measure(setting: Setting, options: dict[str, Any], seconds: float) -> Row:
    """Each program in a process of its own, of which one waits while the other makes an update."""
    what = ["--device", setting.device, "--precision", options["precision"], "--batch-size", str(options["batch_size"])]
    what += ["--threads", str(1 if setting.dry else _THREADS), *(["--gan"] if options["gan"] else [])]
    theirs = [sys.executable, "-m", "benchmarks.fastgen_updates", "--fastgen", str(setting.fastgen), *what]
    form = [f"trainer.compile={str(options['compile']).lower()}", "logger=csv"]
    ours = [sys.executable, "-m", "benchmarks.diff_instruct_updates", *what, *form]
    with Program("FastGen", theirs) as one, Program("this framework", ours) as other:
        return fastgen.measure(one, other, _DRY_ROUNDS if setting.dry else _ROUNDS)


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each kind of update, and for DMD2's mix of them."""
    lines = [
        "| precision | GAN | ours | batch | update | FastGen, s | ours, s | ours over it (least .. greatest) "
        "| GiB: FastGen, ours |",
        "|---|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        for kind, figures in row["beside_fastgen"].items() if row["status"] == PASSED else ():
            lines.append(
                f"| {row['precision']} | {'yes' if row['gan'] else 'no'} | {'compiled' if row['compile'] else 'eager'} "
                f"| {row['batch_size']} | {kind} | {figures['fastgen']['median']:.4g} | {figures['ours']['median']:.4g} "
                f"| {spread(figures['ratio'], '.3g')} | {row['peak_gib']['fastgen']:.1f}, {row['peak_gib']['ours']:.1f} |"
            )
    return lines


def missing(setting: Setting) -> str | None:
    return None if setting.fastgen else "--fastgen names no checkout of FastGen"


DMD2 = Stage("fastgen", "DMD2's updates beside FastGen's, in turns", entries, measure, table, missing)

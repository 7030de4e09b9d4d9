"""What further GPUs bring to a training step, and what each sends: NCCL, a process for each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import scaling
from benchmarks.gpu.cases import ARCHITECTURES
from benchmarks.gpu.stages import Entry, Setting, Stage
from benchmarks.gpu.worker import PASSED, Row

_BATCH = 128  # of each GPU
_CASE = replace(ARCHITECTURES["cifar10"], warmup=10, window=20)
_STRATEGIES = ("averaged", "ddp_find_unused_parameters_true")


def entries(setting: Setting) -> Iterator[Entry]:
    """One GPU, all, then the powers of two between."""
    counts = [n for n in (2, 4, 8, 16) if n < setting.gpus]
    for count in dict.fromkeys((1, setting.gpus, *counts)):
        for strategy in _STRATEGIES if count > 1 else ("auto",):
            yield Entry(
                f"{count} GPU{'s' * (count > 1)}, {strategy}",
                {"gpus": count, "strategy": strategy},
                limit=120,
                least=25,
            )


def measure(setting: Setting, options: dict[str, Any], seconds: float) -> Row:
    """Diff-Instruct in bf16-mixed, with the same batch on each GPU."""
    count = options["gpus"]
    place = scaling.Setting(count, count * _BATCH // 4, options["strategy"])  # the case's batch is 4
    figures = scaling.run(_CASE, place, ("trainer.precision=bf16-mixed",), setting.accelerator)
    step = figures["seconds"] / _CASE.window
    return {
        "batch_size": figures["batch_size"],
        "seconds_per_step": step,
        "images_per_second": figures["batch_size"] / step,
        "bytes_per_step": figures["sent"] / _CASE.window,
    }


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each number of GPUs and strategy."""
    lines = [
        "| GPUs | strategy | batch | s/step | images/s | of one GPU's, each | MB given to all-reduce |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    passed = [row for row in rows if row["status"] == PASSED]
    single = next((row["images_per_second"] for row in passed if row["gpus"] == 1), None)
    for row in passed:
        share = f"{row['images_per_second'] / row['gpus'] / single:.1%}" if single else ""
        lines.append(
            f"| {row['gpus']} | {row['strategy']} | {row['batch_size']} | {row['seconds_per_step']:.4g} "
            f"| {row['images_per_second']:,.4g} | {share} | {row['bytes_per_step'] / 1e6:.4g} |"
        )
    return lines


def missing(setting: Setting) -> str | None:
    return None if setting.gpus > 1 else f"there {'is one GPU' if setting.gpus else 'are no GPUs'}"


SEVERAL = Stage("gpus", "several GPUs, Diff-Instruct in bf16-mixed", entries, measure, table, missing)

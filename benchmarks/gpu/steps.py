"""Seconds and memory of a training step of each method, in every form of its networks, as a share of the card's peak."""

import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.gpu.cases import ALL_METHODS, ARCHITECTURES
from benchmarks.gpu.flops import CountOperations, forward_passes
from benchmarks.gpu.stages import Entry, Setting, Stage
from benchmarks.gpu.worker import PASSED, Row
from benchmarks.measuring import clock, spread, summary
from benchmarks.methods import CYCLE, config, prepared

_MOST = 1_000_000  # steps; the timer ends the training
_WINDOW = 0.25  # seconds at least between two waits for the device
_MEASURED = 2.0  # seconds of all windows; in a dry run none
_WINDOWS = 3  # at least
# sfd of a random number of steps has no mean in a few updates, and a drift beside the prediction adds a loss, no evaluation.
METHODS = [name for name in ALL_METHODS if name not in ("sfd, 1 to 4 steps", "bezier, prediction and drift")]
_LARGE = ("diff_instruct", "sfd", "pretrain")  # methods measured in the largest network too


def entries(setting: Setting) -> Iterator[Entry]:
    """First score distillation, plain and compiled, then every method as most will run it, then the other forms."""
    if setting.dry:
        for method in ("diff_instruct, GAN", "sfd", "bezier"):
            yield _entry(method, "tiny", 8)
        yield _entry("pretrain", "tiny", 4, "32-true", "aot_eager", channels_last=True)
        return
    others = [name for name in METHODS if name != "diff_instruct"]
    chosen = list(dict.fromkeys((*_LARGE, *others)))
    seen: set[str] = set()
    for entry in (
        _entry("diff_instruct"),
        _entry("diff_instruct", compile=True),
        *(_entry(method) for method in others),
        *(_entry(method, compile=True) for method in _LARGE),
        _entry("diff_instruct", precision="32-true"),
        _entry("diff_instruct", precision="tf32"),
        _entry("diff_instruct", channels_last=True),
        _entry("diff_instruct", compile=True, channels_last=False),
        _entry("diff_instruct", compile="reduce-overhead"),
        *(_entry("diff_instruct", batch=batch) for batch in (512, 256)),
        *(_entry("diff_instruct", batch=batch, compile=True) for batch in (512, 256)),
        *(_entry(method, "imagenet64", 64) for method in _LARGE),
        *(_entry(method, "imagenet64", 64, compile=True) for method in _LARGE),
        *(_entry(method, compile=True) for method in others),
        *(_entry(method, batch=512) for method in chosen),
        *(_entry(method, channels_last=True) for method in chosen),
        *(_entry(method, precision=precision) for precision in ("tf32", "32-true") for method in chosen),
        *(_entry(method, compile="reduce-overhead") for method in chosen),
        *(_entry(method, batch=256) for method in chosen),
        *(_entry(method, batch=batch, compile=True) for batch in (512, 256) for method in chosen),
    ):
        if entry.name not in seen:
            seen.add(entry.name)
            yield entry


def _entry(
    method: str,
    architecture: str = "cifar10",
    batch: int = 128,
    precision: str = "bf16-mixed",
    compile: bool | str = False,
    channels_last: bool | None = None,
) -> Entry:
    """channels_last: None for what trainer.channels_last=auto is on a GPU."""
    channels_last = bool(compile) if channels_last is None else channels_last
    options = {
        "method": method,
        "architecture": architecture,
        "batch_size": batch,
        "precision": precision,
        "compile": compile,
        "channels_last": channels_last,
    }
    form = ", ".join([precision, *([_form(options)] if compile or channels_last else [])])
    large = architecture == "imagenet64"
    limit, least = (240.0 if large else 150.0, 30.0) if compile else (90.0 if large else 45.0, 5.0)
    return Entry(
        f"{method}, {architecture}, batch {batch}, {form}", options, limit, 1.0 if architecture == "tiny" else least
    )


def _form(options: dict[str, Any]) -> str:
    compile = {True: "compiled", False: "eager"}.get(options["compile"], options["compile"])
    return compile + (", channels last" if options["channels_last"] else "")


class Windows(pl.Callback):
    """Times windows of whole cycles of updates, at whose ends alone it waits for the device, and ends the training.

    Attributes:
        warmup_seconds: From the start to the end of the cycles before the first window, with all compilation.
        seconds: A step's mean in each window.
    """

    def __init__(self, warmup: int, least: float, until: float):
        """Choose how long to measure.

        Args:
            warmup: Cycles before the first window.
            least: Seconds of all windows; where 0 one window of any length is enough.
            until: `time.monotonic()` after which no window is begun once there is one.
        """
        self.mark, self.least, self.until = warmup * CYCLE, least, until
        self.warmup_seconds = 0.0
        self.seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._window, self._begun = 0, clock(pl_module.device)
        self._total = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step < self.mark:
            return
        now = clock(pl_module.device)
        elapsed = now - self._begun
        if not self._window:
            self.warmup_seconds, self._window = elapsed, CYCLE
        elif self.least and elapsed < _WINDOW and not self.seconds:
            self._window *= math.ceil(1.1 * _WINDOW / elapsed)
        else:
            self.seconds.append(elapsed / self._window)
            self._total += elapsed
            enough = not self.least or (len(self.seconds) >= _WINDOWS and self._total >= self.least)
            trainer.should_stop = enough or time.monotonic() + elapsed > self.until
        self.mark = trainer.global_step + self._window
        self._begun = clock(pl_module.device)


class HostWaits(pl.Callback):
    """Finds where the host waits for a GPU within a cycle of updates that logs nothing, by torch's own check.

    Attributes:
        lines: "file:line" of the innermost Python function, with how often in the cycle.
    """

    def __init__(self, first: int):
        """Choose the cycle by its first step."""
        self.first = first
        self.lines: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda" and trainer.global_step == self.first:
            self._recording = warnings.catch_warnings(record=True)
            self._warnings = self._recording.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda" and trainer.global_step == self.first + CYCLE:
            torch.cuda.set_sync_debug_mode("default")
            self._recording.__exit__(None, None, None)
            waits = [each for each in self._warnings if "synchronizing CUDA operation" in str(each.message)]
            self.lines.update(f"{each.filename}:{each.lineno}" for each in waits)

    def on_exception(self, *_: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("default")


def measure(setting: Setting, options: dict[str, Any], seconds: float) -> Row:
    """Train one method for some windows of steps."""
    until = time.monotonic() + 0.8 * seconds
    name, batch, compiled = options["method"], options["batch_size"], options["compile"]
    passes = forward_passes(name)
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = config(
            ARCHITECTURES[options["architecture"]],
            folder,
            *ALL_METHODS[name],
            f"batch_size={batch}",
            f"trainer.precision={options['precision']}",
            f"trainer.accelerator={setting.accelerator}",
            f"trainer.compile={str(compiled).lower()}",
            f"trainer.channels_last={str(options['channels_last']).lower()}",
            f"trainer.validate_every_n_steps={sys.maxsize}",
        )
        if "pairs" in cfg.method:
            cfg.method.pairs = cfg.method.held_out = batch
        _reset_counters()
        method, data, trainer = prepared(cfg, name, _MOST)
        warmup = 3 if compiled else 2
        counted, timer = CountOperations(), Windows(warmup, 0 if setting.dry else _MEASURED, until)
        waits = HostWaits((warmup - 1) * CYCLE)
        trainer.callbacks += [counted, waits, timer]
        trainer.fit(method, data)
    step = summary(timer.seconds)
    operations = sum(passes[network] * counted.operations[network] for network in passes)
    rate = operations * batch / step["median"] / 1e12
    row = {
        "parameters": sum(p.numel() for p in method.student.network.parameters()),
        "seconds_per_step": step,
        "images_per_second": batch / step["median"],
        "warmup_seconds": timer.warmup_seconds,
        "forward_passes_per_image": passes,
        "operations_per_image": operations,
        "tflops": rate,
        "share_of_peak": rate / setting.peak_tflops if setting.peak_tflops else None,
        "host_waits_of_a_cycle": dict(waits.lines),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if setting.device == "cuda" else None,
    }
    return row | (_compilation() if compiled else {})


def _reset_counters() -> None:
    from torch._dynamo.utils import counters  # takes seconds

    counters.clear()


def _compilation() -> Row:
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each entry that passed; waits: of the host for the device, in a cycle of updates that logs nothing."""
    lines = [
        "| network | method | batch | precision | form | s/step (least .. greatest) | images/s | GiB | TFLOP/s | of peak "
        "| waits |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["status"] == PASSED:
            memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
            lines.append(
                f"| {row['architecture']} | {row['method']} | {row['batch_size']} | {row['precision']} | {_form(row)} "
                f"| {spread(row['seconds_per_step'])} "
                f"| {row['images_per_second']:,.4g} | {memory} | {row['tflops']:.4g} | {share} "
                f"| {sum(row['host_waits_of_a_cycle'].values())} |"
            )
    return lines


STEPS = Stage("steps", "training steps", entries, measure, table)

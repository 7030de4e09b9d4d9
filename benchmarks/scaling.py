"""What a second process brings to a training step, and what each has to send: one thread each, on the CPU."""

import multiprocessing
import os
import socket
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.cases import DIGITS, Case, compose_config, prepare
from benchmarks.measuring import clock, summary
from datamodules import DataFree
from launch.errors import quiet

CASE = replace(DIGITS, warmup=10, window=10, rounds=5)
_LIMIT = 600  # seconds for the steps behind one figure


@dataclass(frozen=True)
class Setting:
    """How many processes train, and on what.

    processes: with a thread each, and a GPU where they compute on those. batches: the global batch, in the config's batches.
    """

    processes: int
    batches: int = 1
    strategy: str = "auto"


SETTINGS = {
    "single": Setting(1),
    "strong": Setting(2, strategy="averaged"),
    "strong_ddp": Setting(2, strategy="ddp_find_unused_parameters_true"),
    "weak": Setting(2, batches=2, strategy="averaged"),
}


class WindowTimer(pl.Callback):
    """Seconds and bytes of `window` steps after `warmup` others."""

    def __init__(self, warmup: int, window: int):
        self.marks = (warmup, warmup + window)
        self.seconds = self.sent = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.marks:
            self.seconds = clock(pl_module.device) - self.seconds
            self.sent = getattr(trainer.strategy, "bytes_reduced", 0) - self.sent


def measure(case: Case = CASE, *overrides: str) -> dict[str, Any]:
    """Diff-Instruct, whose two networks learn alternately: one setting after the other, in new processes each.

    strong: two processes share the single one's batch. weak: each of two has a batch of that size.

    Raises:
        RuntimeError: Where a process fails.
    """
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    sent: dict[str, float] = {}
    for _ in range(case.rounds):
        for name, setting in SETTINGS.items():
            figures = run(case, setting, overrides)
            seconds[name].append(figures["seconds"] / case.window)
            sent[setting.strategy] = figures["sent"] / case.window

    def over(other: str, images: int = 1) -> dict[str, float]:
        pairs = zip(seconds["single"], seconds[other], strict=True)
        return summary([images * single / theirs for single, theirs in pairs])

    return {
        "title": f"two processes with a thread each: diff_instruct, {case.title}",
        "device": "cpu",
        "batch_size": figures["batch_size"] // SETTINGS["weak"].batches,
        "parameters": figures["parameters"],
        "teacher_weights": figures["teacher_weights"],
        "window_steps": case.window,
        **{f"{name}_step_seconds": summary(values) for name, values in seconds.items()},
        "strong_over_single": over("strong"),
        "strong_ddp_over_single": over("strong_ddp"),
        "weak_over_single": over("weak", images=2),
        "bytes_per_step": {strategy: count for strategy, count in sent.items() if strategy != "auto"},
    }


def run(case: Case, setting: Setting, overrides: tuple[str, ...], accelerator: str = "cpu") -> dict[str, Any]:
    """Train once in a setting, each process on a device of its own; rank 0's figures."""
    context = multiprocessing.get_context("forkserver")  # a fresh interpreter for each would spend its time on imports
    context.set_forkserver_preload(["benchmarks.scaling"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    figures = context.SimpleQueue()
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        common = (case, setting, overrides, accelerator, folder, port, figures)
        ranks = [context.Process(target=_work, args=(rank, *common)) for rank in range(setting.processes)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(_LIMIT)
            process.kill()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"a process of the benchmark failed, see above: {setting}")
    return figures.get()


def _work(
    rank: int,
    case: Case,
    setting: Setting,
    overrides: tuple[str, ...],
    accelerator: str,
    folder: str,
    port: int,
    figures: Any,
) -> None:
    if setting.processes > 1:  # as torchrun starts them
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), setting.processes),
        }
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
        os.environ |= {key: str(value) for key, value in place.items()}
    torch.set_num_threads(1)
    quiet()
    options = ("method=diff_instruct", f"trainer.accelerator={accelerator}", "callbacks.progress=null")
    cfg = compose_config(case, folder, *options, f"trainer.devices={setting.processes}", *overrides)
    cfg.batch_size *= setting.batches
    cfg.trainer.strategy = setting.strategy
    timer = WindowTimer(case.warmup, case.window)
    method, trainer = prepare(cfg, case.warmup + case.window, timer)
    trainer.fit(method, DataFree(cfg.batch_size))
    if rank == 0:
        parameters = sum(p.numel() for p in method.student.parameters())
        weights = method.teacher.weights or "random"
        facts = {"batch_size": cfg.batch_size, "parameters": parameters, "teacher_weights": str(weights)}
        figures.put({"seconds": timer.seconds, "sent": timer.sent, **facts})

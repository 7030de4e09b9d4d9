"""Seconds of each update of diff_instruct over the floor of its network evaluations."""

import gc
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl

from benchmarks.cases import CIFAR10, DIGITS, Case, compose_config, prepare
from benchmarks.floor import FLOOR, Evaluations, Floor, latest_update
from benchmarks.measuring import clock, summary
from launch.errors import quiet
from launch.run.build import build

_WARMUP = 2  # cycles; the first allocates Adam's averages


class UpdateTimer(pl.Callback):
    """Times the trainer's updates, and after each cycle of them the floor of such a cycle, from inside one `fit`.

    A whole cycle, so that in both an update follows the same kind of update and finds memory as that left it. An update of
    the trainer ends with the callbacks before this one, and begins with what the trainer does after it: logs, and the next
    batch. Kind of update -> one entry per cycle: `framework` has seconds, `floor` those of its evaluations and of its
    optimiser steps.
    """

    def __init__(self):
        self.framework: dict[str, list[float]] = {}
        self.floor: dict[str, list[tuple[float, float]]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._floor = Floor(pl_module, trainer.precision_plugin.train_step_context)
        self._evaluations = Evaluations(pl_module)  # after the copies above, which would count too
        self._begun = clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = clock(pl_module.device) - self._begun
        kind = latest_update(pl_module)
        self._evaluations.check(kind)
        self.framework.setdefault(kind, []).append(seconds)
        if pl_module.student_updated:  # a cycle's end
            for update in self.framework:
                self.floor.setdefault(update, []).append(self._floor.update(update))
        self._evaluations.counted.clear()  # with the teacher's, which the floor shares
        self._begun = clock(pl_module.device)


def measure(
    cases: tuple[Case, ...] = (DIGITS, CIFAR10), precisions: tuple[str, ...] = ("32-true", "bf16-mixed")
) -> dict[str, Any]:
    """A part for each case and precision; needs a temporary folder of a few checkpoints' size, and leaves nothing."""
    quiet()
    return {
        "title": "score distillation over the floor of its network evaluations",
        "parts": [measure_one(case, precision) for case in cases for precision in precisions],
    }


def measure_one(case: Case, precision: str) -> dict[str, Any]:
    """The figures of alternating updates, and of both at once."""
    alternating, facts = timed(case, precision, two_sided=False)
    both, _ = timed(case, precision, two_sided=True)
    rounds = alternating | both
    cycle = rounds["fake"] + rounds["generator"]
    figures = {f"{kind}_{key}": value for kind, seconds in rounds.items() for key, value in compared(seconds).items()}
    size = facts["batch_size"]
    return {
        "title": f"Diff-Instruct in {precision}, {case.title}",
        **facts,
        "precision": precision,
        "cycles_per_figure": case.cycles,
        "evaluations": FLOOR,  # as counted: an update with others was refused
        **figures,
        **{f"cycle_{key}": value for key, value in compared(cycle).items()},
        "training_images_per_second": summary(list(2 * size / cycle[:, 0])),
        "both_training_images_per_second": summary(list(size / rounds["both"][:, 0])),
    }


def timed(case: Case, precision: str, two_sided: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(rounds, 3) seconds for each kind of update: framework, evaluations, optimiser; and what was trained."""
    gc.collect()  # trainer and method of the fit before hold each other, and gigabytes
    updates = ("method.fake_updates=1", f"method.two_sided={str(two_sided).lower()}")
    options = ("method=diff_instruct", *updates, f"trainer.precision={precision}")
    cycles = _WARMUP + case.cycle_rounds * case.cycles
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = compose_config(case, folder, *options)
        timer = UpdateTimer()
        method, trainer = prepare(cfg, cycles * (1 if two_sided else 2), timer)
        trainer.fit(method, method.training_data(build(cfg.data)))
    facts = {
        "device": str(trainer.strategy.root_device),
        "batch_size": method.batch_size,
        "parameters": sum(p.numel() for p in method.student.parameters()),
        "teacher_weights": method.teacher.weights or "random",
        "log_every_n_steps": trainer.log_every_n_steps,
    }
    rounds, kept = {}, slice(_WARMUP, cycles)
    for kind, framework in timer.framework.items():
        seconds = np.column_stack([framework[kept], timer.floor[kind][kept]])
        rounds[kind] = seconds.reshape(case.cycle_rounds, case.cycles, 3).mean(1)
    return rounds, facts


def compared(rounds: np.ndarray) -> dict[str, dict[str, float]]:
    """Summaries of (rounds, 3) seconds: the framework's, the evaluations', these with the optimiser, and the ratio."""
    framework, evaluations, optimizer = rounds.T
    floor = evaluations + optimizer
    return {
        "seconds": summary(list(framework)),
        "evaluation_seconds": summary(list(evaluations)),
        "floor_seconds": summary(list(floor)),
        "over_floor": summary(list(framework / floor - 1)),
    }

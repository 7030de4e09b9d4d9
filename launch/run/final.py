"""What stands at the end of every training run: its measurement, pictures, exported weights and table."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks import GenerativeMetrics, WandbRun, plot_curves
from launch.evaluate.measure import Evaluation
from launch.evaluate.trained_run import load_student, samplers
from launch.run.folder import RunFolder
from launch.run.plan import evaluations_before
from lightning_modules import Method
from stillhouse.analysis.compare_convergence import compare_runs
from stillhouse.analysis.convergence import convergence_summary_rows
from stillhouse.analysis.curves import reference_lines
from stillhouse.analysis.tables import records_text
from stillhouse.checkpoints.weights import save_weights
from stillhouse.diffusion.preconditioning import description_of
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS
from stillhouse.diffusion.teacher import can_hide_labels
from stillhouse.metrics.records import Record, save_records
from stillhouse.ranks import rank_and_world


def finish(
    method: Method, data: Any, training: Any, settings: dict[str, Any], folder: RunFolder, trainer: pl.Trainer
) -> None:
    """Measure the trained student beside its teacher and real images, and leave the results in the run folder.

    training: what it was trained on. All ranks sample; rank zero writes. metrics.json comes after all that makes a run
    complete.
    """
    boards = [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]
    try:
        weights = load_student(method, folder, reached=method.total_steps)
        device = trainer.strategy.root_device
        method.to(device)
        evaluation = Evaluation(settings, data, device)
        records = evaluation.run(method, folder, weights)
        try:
            lines = curve_lines(method, data, device, trainer.callbacks)
            evaluation.pictures(folder.path, samplers(method, folder))
            if rank_and_world()[0] == 0:
                export(method, training, records, folder)
                if lines:
                    save_records(folder.monitoring, lines)
                save_records(folder.metrics, records)
                if (folder.path / "metrics.csv").exists():  # a choice of conf/logger
                    curves = reference_lines(folder.monitoring)
                    plot_curves(folder.path / "metrics.csv", folder.path / "curves.png", curves)
        finally:  # also where the disk was full
            if rank_and_world()[0] == 0:
                print(f"\n{folder.path}\n\n{records_text(records)}", flush=True)
        if rank_and_world()[0] == 0:
            for board in boards:
                board.log_final(records, folder.path, method.total_steps - 1, convergence_rows(folder))
    except BaseException:
        for board in boards:
            board.close(failed=True)
        raise
    for board in boards:
        board.close()


def curve_lines(method: Method, data: Any, device: torch.device, callbacks: Sequence[pl.Callback]) -> list[Record]:
    """What the run's curve is to be compared with: its teacher and real images, measured as GenerativeMetrics does."""
    records = []
    for monitor in callbacks:
        if isinstance(monitor, GenerativeMetrics):
            evaluation = Evaluation(monitor.settings(), data, device, first_seed=MONITOR_SEEDS)
            records += evaluation.teacher(method.teacher) if method.teacher else []
            records += evaluation.real()
    return records


def convergence_rows(folder: RunFolder) -> list[list[str]] | None:
    """The run's row of a comparison, under its header; None for a run without a curve."""
    try:
        return convergence_summary_rows(compare_runs([folder]))
    except (ValueError, OSError):
        return None


def export(method: Method, training: Any, records: list[Record], folder: RunFolder) -> None:
    """student.safetensors and its card: the evaluated weights, readable as any teacher's.

    The card's network_evaluations are those of the whole training, with all that had to be there before its first step.
    """
    weights, sampling = method.exported(), method.sampling(method.chosen_nfe)
    images = method.total_steps * method.batch_size
    card = {
        "run": folder.name,
        "method": method.name,
        "command": command(),
        "seed": method.seed,
        "steps": method.total_steps,
        "kimg": images / 1000,
        "network_evaluations": evaluations_before(method, training) + images * sum(method.evaluations.values()),
        "nfe": method.nfe,
        "sampling": sampling.plain(),
        "preconditioning": description_of(method.sampled_student().preconditioning),
        "parameters": sum(
            weights[name].numel() for name, _ in method.student.network.named_parameters() if name in weights
        ),
        "teacher": method.teacher.name if method.teacher else None,
        **({"guidance": method.teacher.guidance_name} if method.teacher and method.teacher.guided else {}),
        "licence": method.licence,
        **({"two_times": True} if method.student.two_times else {}),
        # Whatever its teacher knows: a student from which no label was hidden can't do without.
        **({} if can_hide_labels(method.student.network) else {"label_dropout": 0.0}),
        "metrics": {
            f"{r.metric}/{r.subject}": {"nfe": r.nfe, "mean": r.mean, "std": r.std, "values": r.values} for r in records
        },
    }
    save_weights(folder.path / "student.safetensors", weights, card, replace=True)


def command() -> str:
    """The command line of this run, as a user would repeat it beside train.py."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--config-name")]
    return shlex.join(["python", Path(sys.argv[0]).name, *overrides])

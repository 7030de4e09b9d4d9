"""What stands at the end of every training run: its measurement, pictures, exported weights and table."""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from callbacks import draw_curves, reference_lines
from launch.folder import RunFolder
from launch.measure import Evaluation, load_student, samplers
from lightning_modules import Method
from metrics.ranks import rank_and_world
from metrics.records import Record, save_records
from metrics.tables import table
from networks.weights import save_weights


def finish(method: Method, data: Any, settings: dict[str, Any], folder: RunFolder, device: torch.device) -> None:
    """Measure the trained student beside its teacher and real images, and leave the results in the run folder.

    All ranks sample; rank zero writes. metrics.json comes last: its presence means that the run is complete.
    """
    weights = load_student(method, folder)
    method.to(device)
    evaluation = Evaluation(settings, data, device)
    records = evaluation.run(method, folder, weights)
    evaluation.pictures(folder.path, samplers(method, folder))
    if rank_and_world()[0] == 0:
        export(method, records, folder)
        save_records(folder.metrics, records)
        if (folder.path / "metrics.csv").exists():  # a choice of conf/logger
            draw_curves(folder.path / "metrics.csv", folder.path / "curves.png", reference_lines(folder.metrics))
        print(f"\n{folder.path}\n\n{table(records)}", flush=True)


def export(method: Method, records: list[Record], folder: RunFolder) -> None:
    """student.safetensors and its card: the evaluated weights, readable as any teacher's."""
    weights = method.exported()
    card = {
        "run": folder.name,
        "method": method.name,
        "command": command(),
        "seed": method.seed,
        "steps": method.total_steps,
        "kimg": method.total_steps * method.batch_size / 1000,
        "parameters": sum(
            weights[name].numel() for name, _ in method.student.network.named_parameters() if name in weights
        ),
        "teacher": method.teacher.name if method.teacher else None,
        "licence": method.licence,
        "metrics": {
            f"{r.metric}/{r.subject}": {"nfe": r.nfe, "mean": r.mean, "std": r.std, "values": r.values} for r in records
        },
    }
    save_weights(folder.path / "student.safetensors", weights, card, replace=True)


def command() -> str:
    """The command line of this run, as a user would repeat it beside train.py."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--config-name")]
    return shlex.join(["python", Path(sys.argv[0]).name, *overrides])

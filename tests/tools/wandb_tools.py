"""What W&B keeps of an offline run, read back."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from callbacks.loggers import wandb_files


def records(folder: Path) -> Iterator[Any]:
    (path,) = folder.glob("run-*.wandb")
    return wandb_files.read_wandb_records(path)


def ended(folder: Path) -> Path:
    """The folder of a run that was ended: wandb's own process may be writing its file a moment longer."""
    for _ in range(200):
        if of_kind(folder, "exit"):
            return folder
        time.sleep(0.05)
    raise TimeoutError(f"{folder} has no end")


def of_kind(folder: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(folder) if record.WhichOneof("record_type") == kind]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every logged row, in order."""
    return [wandb_files.wandb_values(row.item) for row in of_kind(folder, "history")]


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """Rows with a student's loss by Lightning's number of their batch."""
    return {row["trainer/global_step"]: row for row in rows(folder) if "loss/student" in row}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            found |= wandb_files.wandb_values((record.run.config if kind == "run" else record.config).update)
    return found


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for update in of_kind(folder, "summary"):
        found |= wandb_files.wandb_values(update.update)
    return found


def axes(folder: Path) -> dict[str, str]:
    """{metric or pattern: the metric that is its x axis}, as the last definition of each says."""
    named = {index: metric.name for index, metric in enumerate(of_kind(folder, "metric"), 1)}
    return {
        metric.glob_name or metric.name: metric.step_metric or named.get(metric.step_metric_index, "")
        for metric in of_kind(folder, "metric")
    }

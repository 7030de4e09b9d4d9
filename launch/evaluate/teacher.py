"""task=teacher: measure a teacher beside real images."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.evaluate.measure import Evaluation, check_results, print_table, write_results
from launch.evaluate.options import (
    MeasurementOptions,
    TeacherOptions,
    compute_device,
    evaluation_settings,
    fetch_missing,
    step_counts,
)
from launch.run.build import build, build_seeded


class Options(TeacherOptions, MeasurementOptions):
    """conf/task/teacher.yaml."""

    steps: Any
    solver: str | None


def main(cfg: DictConfig) -> None:
    """Measure the teacher at each number of steps; the results go to runs/teacher-NAME.

    Raises:
        ValueError: For impossible options.
        OSError: Where results could not be written, or weights are missing.
    """
    if cfg.solver is not None:
        cfg.teacher.solver = cfg.solver
    steps, device, folder = step_counts(cfg.steps) or [None], compute_device(cfg.device), teacher_folder(cfg)
    check_results(folder)
    fetch_missing(cfg)
    data, teacher = build(cfg.data), build_seeded(cfg.teacher, cfg.seed)
    evaluation = Evaluation(evaluation_settings(cfg), data, device)
    records = [record for count in steps for record in evaluation.teacher(teacher, count)]
    records += evaluation.real()
    try:
        write_results(folder, records, evaluation, {"teacher": teacher.sample})
    finally:
        print_table(records)


def teacher_folder(cfg: DictConfig) -> Path:
    """Return the folder of what is measured of a teacher."""
    return Path("runs") / f"teacher-{cfg.teacher.name}"

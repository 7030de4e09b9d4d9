"""task=runs: measure runs' students beside their teachers and real images, and compare several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from launch.errors import EXPECTED, one_line
from launch.evaluate import middle
from launch.evaluate.measure import Evaluation, check_results, checked, print_table, write_results
from launch.evaluate.options import (
    MeasurementOptions,
    WeightsOptions,
    compute_device,
    evaluation_settings,
    path_option,
    run_folders,
    step_counts,
)
from launch.evaluate.trained_run import TrainedRun, samplers
from launch.run.build import build
from launch.run.folder import RunFolder
from stillhouse.analysis.compare_convergence import write_convergence
from stillhouse.analysis.compare_quality import write_quality
from stillhouse.analysis.stored_runs import distinct_names
from stillhouse.checks import check_choice
from stillhouse.files import check_writable
from stillhouse.metrics.records import Record, merge_records, name_student

COMPARISON_FILES = tuple(f"{name}.{kind}" for name in ("convergence", "quality") for kind in ("json", "png"))


class Options(MeasurementOptions, WeightsOptions):
    """conf/task/runs.yaml."""

    run: Any
    steps: Any
    middle: str | None
    comparison: Any


def main(cfg: DictConfig) -> None:
    """Measure each run that can be measured, say of the others why not, and compare several.

    Raises:
        ValueError: For impossible options, or where no run can be measured.
        OSError: Where results could not be written; found before anything is measured, but for a disk that fills up.
    """
    if cfg.run is None:
        raise ValueError(
            "say what to measure: run=runs/NAME (or a list, or a pattern), teacher=NAME or 'flows=[NAME,NAME]'; "
            "--help shows all tasks"
        )
    check_choice("middle", cfg.middle, (None, "search"))
    folders, counts, device = run_folders(cfg.run), step_counts(cfg.steps), compute_device(cfg.device)
    if cfg.middle:
        search_middle(cfg, folders, device)
        return
    compared = len(folders) > 1 and cfg.comparison is not None
    for folder in folders:
        check_results(folder / "evaluation")
    for name in COMPARISON_FILES if compared else ():
        check_writable(path_option(cfg, "comparison") / name)
    alone = len(folders) == 1 and len(counts) < 2
    runs = {folders[0]: counts} if alone else measurable(cfg, folders, counts)
    names = distinct_names(map(RunFolder, folders))
    shown: list[Record] = []
    try:
        for path, possible in runs.items():
            try:
                run, evaluation, records = measure(cfg, path, possible, device)
            except EXPECTED as error:
                if len(runs) == 1:
                    raise
                print(f"not measured: {_line_about(path, error)}", flush=True)
                continue
            shown = merge_records(shown, name_student(records, names[path]))
            write_results(path / "evaluation", records, evaluation, samplers(run.method, run.folder, possible))
    finally:  # also where an error ends the rest
        print_table(shown)
    if not shown:
        raise ValueError("nothing was measured; the lines above say why")
    if compared:
        compare(folders, path_option(cfg, "comparison"), shown, cfg.weights)


def search_middle(cfg: DictConfig, folders: Sequence[Path], device: torch.device) -> None:
    """Search each run's middle noise level, by as many samples as measurements on the way have, unless the options say more.

    Raises:
        ValueError: Where no run can be searched.
    """
    for path in folders:
        for name in middle.FILES:
            check_writable(path / "evaluation" / name)
    searched = False
    for path in folders:
        try:
            run = load(cfg, path)
            settings = evaluation_settings(cfg, run.config)
            fewer = {"blocks": cfg.blocks or 1, "num_samples": cfg.num_samples or settings["training"]["num_samples"]}
            print(f"\n{middle.search(run, settings | fewer, device)}", flush=True)
            searched = True
        except EXPECTED as error:
            if len(folders) == 1:
                raise
            print(f"not searched: {_line_about(path, error)}", flush=True)
    if not searched:
        raise ValueError("nothing was searched; the lines above say why")


def load(cfg: DictConfig, path: Path) -> TrainedRun:
    """Load the run in `path` with the weights that the options choose."""
    return TrainedRun.load(path, weights=cfg.weights, checkpoint=cfg.checkpoint, download=cfg.download)


def measurable(cfg: DictConfig, folders: Sequence[Path], counts: Sequence[int]) -> dict[Path, list[int]]:
    """Return the runs that can be measured, each with those of the `counts` that its student can take; print the other ones.

    Raises:
        ValueError: Where there is none.
    """
    runs: dict[Path, list[int]] = {}
    lines = []
    for path in folders:
        try:
            run = load(cfg, path)
            checked(evaluation_settings(cfg, run.config), build(run.config.data))
        except EXPECTED as error:
            lines.append(_line_about(path, error))
            continue
        possible = []
        for count in counts:
            try:
                run.at_steps(count)
                possible.append(count)
            except ValueError as error:
                lines.append(_line_about(path, error))
        if possible or not counts:
            runs[path] = possible
    if not runs:
        raise ValueError("; ".join(lines))
    for line in lines:
        print(f"not measured: {line}", flush=True)
    return runs


def _line_about(path: Path, error: Exception) -> str:
    """Return an error's line, which names the run that it is about."""
    line = one_line(error)
    return line if str(path) in line else f"{path}: {line}"


def measure(
    cfg: DictConfig, path: Path, counts: Sequence[int], device: torch.device
) -> tuple[TrainedRun, Evaluation, list[Record]]:
    """Measure one run's teacher, its student at each number of steps (none: its own), and real images."""
    run = load(cfg, path)
    for count in counts:
        run.at_steps(count)  # what is not possible is refused before anything is measured
    evaluation = Evaluation(evaluation_settings(cfg, run.config), build(run.config.data), device)
    return run, evaluation, evaluation.run(run.method.to(device), run.folder, run.weights, counts)


def compare(folders: Sequence[Path], target: Path, records: Sequence[Record], weights: str | None) -> None:
    """Write and print the runs' convergence, and their quality against NFE where students differ in it."""
    runs = [RunFolder(folder) for folder in folders]
    students = [record for record in records if record.subject == "student"]
    if len({record.nfe for record in students}) > 1:
        print(f"\n{write_quality(runs, target, like=students[0], weights=weights)}")
    print(f"\n{write_convergence(runs, target, weights=weights)}")

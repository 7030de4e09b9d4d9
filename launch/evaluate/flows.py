"""task=flows: measure what the errors of a chain of flows, each made from the one before, add up to."""

from typing import Any

from omegaconf import DictConfig

from datamodules.trajectories import check_alike
from launch.evaluate.flow_measurement import FlowMeasurement, place, report
from launch.evaluate.flow_paths import draw_flow_paths, planar
from launch.evaluate.measure import Evaluation
from launch.evaluate.options import (
    DataOptions,
    MeasurementOptions,
    WeightsOptions,
    compute_device,
    evaluation_settings,
    fetch_missing,
    names,
    path_option,
    run_folders,
    step_counts,
)
from launch.evaluate.trained_run import TrainedRun
from launch.run.build import build, build_seeded
from launch.run.teachers import teacher_config
from stillhouse.checks import check_counts
from stillhouse.files import check_writable


class Options(MeasurementOptions, WeightsOptions, DataOptions):
    """conf/task/flows.yaml."""

    flows: Any
    distilled: Any
    steps: Any
    flows_folder: Any
    flow_samples: int
    path_steps: int


def main(cfg: DictConfig) -> None:
    """Measure the flows, then the runs distilled from them; write flows.json, its plot and, of planar data, the paths.

    Raises:
        ValueError: For impossible options, flows that differ in size or classes, or a run of another chain.
        OSError: Where results could not be written, or weights are missing.
    """
    if cfg.flows is None:
        raise ValueError("say which flows: 'flows=[NAME,NAME]', of conf/teacher or run folders")
    for option in ("weights", "checkpoint"):
        if cfg.distilled is None and cfg[option] is not None:
            raise ValueError(f"{option}={cfg[option]} is for the runs in distilled, and none are given")
    steps, device = step_counts(cfg.steps) or [1], compute_device(cfg.device)
    check_counts(2, flow_samples=cfg.flow_samples)
    check_counts(path_steps=cfg.path_steps)
    fetch_missing(cfg)
    cfg.flows = [teacher_config(name, "flows") for name in names(cfg.flows, "flows")]  # with the data's resolution
    flows, data = [build_seeded(flow, cfg.seed) for flow in cfg.flows], build(cfg.data)
    check_alike(flows, "flows")
    folders = [] if cfg.distilled is None else run_folders(cfg.distilled, "distilled")

    def runs():  # one at a time is in memory
        for path in folders:
            yield TrainedRun.load(path, weights=cfg.weights, checkpoint=cfg.checkpoint, download=cfg.download)

    for run in runs():
        place(flows, run)  # refuses one of another chain before the flows are measured
    folder = path_option(cfg, "flows_folder")
    for name in ("flows.json", "flows.png", "paths.png"):
        check_writable(folder / name)
    evaluation = Evaluation(evaluation_settings(cfg), data, device)
    measurement = FlowMeasurement(flows, evaluation, samples=cfg.flow_samples, path_steps=cfg.path_steps)
    print(f"\n{report(measurement.run(steps, runs()), folder)}")
    if planar(evaluation.shape):
        students = (run.method.to(device) for run in runs())
        draw_flow_paths(folder / "paths.png", flows, students, evaluation, cfg.path_steps)
        print(f"{folder}/paths.png written")

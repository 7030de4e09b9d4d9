"""task=flows: measure what the errors of a chain of flows, each made from the one before, add up to."""

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from datamodules.trajectories import check_alike
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
from launch.run.build import build, build_seeded, check_teacher
from launch.run.teachers import teacher_config
from lightning_modules import Method
from stillhouse.analysis.config_groups import comparable_options, labels, training_options
from stillhouse.analysis.flow_chain import (
    ChainedFlow,
    DistilledRun,
    FlowChain,
    scores_by_metric,
)
from stillhouse.analysis.flow_errors import mean_with_error, sample_images, squared_distances, straightness
from stillhouse.analysis.flow_plot import write_flow_chain
from stillhouse.checks import check_counts, check_memory
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.diffusion.teacher import Teacher
from stillhouse.files import check_writable
from stillhouse.metrics.distances import wasserstein_distance
from stillhouse.metrics.images import from_uint8
from stillhouse.pictures.paths import bezier_panel, coupling_panel, flow_panel, planar_points, plot_paths
from stillhouse.pictures.points import PLANE

MATCHED = 2000  # samples that W2 is computed from, at most: its time grows with their cube
_PLACE = ("teacher", "method.teacher", "method.teachers")  # where in a chain a run stands
LINES = 48  # paths in a panel of paths.png
CLOUD = 1000  # points of the data behind them


class FlowMeasurement:
    """Measures flows, and the students distilled from them, on the noise and labels of the first `samples` evaluation seeds.

    Raises:
        ValueError: For no flow, for one that differs from the others or the data in size or classes, or where only published
            statistics stand for the data.
    """

    def __init__(self, flows: Sequence[Teacher], evaluation: Evaluation, *, samples: int, path_steps: int):
        if not evaluation.has_images:
            raise ValueError("flows are measured against the real images themselves: set evaluation.reference=null")
        for flow in flows:
            check_teacher(flow, evaluation.data)
            flow.to(evaluation.device)
        self.flows, self.evaluation, self.path_steps = flows, evaluation, path_steps
        self.sampling = {
            "shape": evaluation.shape,
            "num_classes": evaluation.data.num_classes,
            "batch_size": evaluation.settings["batch_size"],
            "device": evaluation.device,
            "class_counts": evaluation.class_counts,
        }
        pixels = math.prod(evaluation.shape)
        check_memory(
            4 * pixels * samples * (len(flows) + 1), f"flow_samples={samples} (lower it): the ends of all flows"
        )
        self.seeds = torch.arange(samples)
        self.ends: list[Tensor] = []
        packed = evaluation.data.reference()
        self.matched = min(samples, MATCHED, len(packed))
        self.real = real_images(packed, self.matched)

    def run(self, steps: Sequence[int], runs: Iterable[TrainedRun]) -> FlowChain:
        """Measure the flows, then the runs distilled from them, one at a time.

        Args:
            steps: Numbers of Euler steps to score every flow at.
            runs: With their students in place.
        """
        self.ends = [sample_images(flow.sample, self.seeds, **self.sampling) for flow in self.flows]
        flows = [self._flow(k, steps) for k in range(len(self.flows))]
        distilled, options_of_runs, notes = [], [], []
        for run in runs:
            options, value, lines = self._distilled(run)
            options_of_runs.append(options)
            distilled.append(value)
            notes += lines
        groups = labels(options_of_runs)
        real = self.evaluation.real()
        return FlowChain(
            tuple(flows),
            tuple(DistilledRun(group=group, **value) for group, value in zip(groups, distilled, strict=True)),
            samples=len(self.seeds),
            path_steps=self.path_steps,
            matched=self.matched,
            fingerprint=real[0].comparable,
            floor=scores_by_metric(real),
            notes=tuple(notes),
        )

    def _flow(self, k: int, steps: Sequence[int]) -> ChainedFlow:
        flow, images = self.flows[k], self.ends[k]
        options = {key: self.sampling[key] for key in ("batch_size", "device", "class_counts")}
        euler = copy.copy(flow)  # the same network and noise levels
        euler.solver, euler.solver_options = "euler", {}
        simulated = self.evaluation.teacher(flow)
        return ChainedFlow(
            name=flow.name,
            solver=flow.solver_name,
            nfe=flow.nfe(),
            step_drift=mean_with_error(squared_distances(images, self.ends[k - 1])) if k else None,
            end_drift=mean_with_error(squared_distances(images, self.ends[0])) if k else None,
            straightness=straightness(flow, self.seeds, self.path_steps, label=f"{flow.name}, straightness", **options),
            w2=wasserstein_distance(images[: self.matched], self.real),
            simulated=scores_by_metric(simulated),
            euler={count: scores_by_metric(self.evaluation.teacher(euler, count)) for count in steps},
            provenance=simulated[0].provenance,
        )

    def _distilled(self, run: TrainedRun) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """Return what the run's group depends on, all of `DistilledRun` but the group, and remarks."""
        k = place(self.flows, run)
        method = run.method.to(self.evaluation.device)
        target, notes = method.end_teacher(), []
        images = sample_images(method.sample, self.seeds, **self.sampling)
        regression = None
        if target is not None and target.hash == self.flows[k].hash:
            regression = mean_with_error(squared_distances(images, self.ends[k]))
            if sampled_by(target) != sampled_by(self.flows[k]):
                notes.append(
                    f"{run.folder.path} was trained on samples of {sampled_by(target)}, not {sampled_by(self.flows[k])}"
                )
        records = self.evaluation.student(method, run.folder, run.weights)
        if records[0].unfinished:
            step, total = (records[0].training[key] for key in ("step", "total"))
            notes.append(f"{run.folder.path} was measured after {step} of {total} training steps")
        value = {
            "flow": k + 1,
            "name": run.folder.name,
            "seed": int(run.config.get("seed", 0)),
            "nfe": method.nfe,
            "weights": run.weights.name,
            "regression": regression,
            "w2": wasserstein_distance(images[: self.matched], self.real),
            "scores": scores_by_metric(records),
            "provenance": records[0].provenance,
        }
        return self._group_options(run, k), value, notes

    def _group_options(self, run: TrainedRun, k: int) -> dict[str, str]:
        """What makes runs one group, wherever in the chain they stand: several teachers count by their distance to the last."""
        config = comparable_options(OmegaConf.to_container(run.config))
        options = {
            key: value
            for key, value in training_options(config).items()
            if not any(key == part or key.startswith(f"{part}.") for part in _PLACE)
        }
        options["NFE"] = str(run.method.nfe)
        teachers = run.method.learned_teachers()
        hashes = [flow.hash for flow in self.flows[: k + 1]][::-1]
        places = [hashes.index(t.hash) if t.hash in hashes else t.name for t in teachers]
        options["teachers"] = ",".join(p if isinstance(p, str) else f"k-{p}" if p else "k" for p in places)
        return options


def place(flows: Sequence[Teacher], run: TrainedRun) -> int:
    """Return the index of the flow that a run's student was distilled from.

    Raises:
        ValueError: For a flow that isn't in the chain.
    """
    teacher = run.method.teacher
    places = [k for k, flow in enumerate(flows) if teacher is not None and flow.hash == teacher.hash]
    if not places:
        name = "none" if teacher is None else f"{teacher.name} ({teacher.hash[:8]})"
        known = ", ".join(f"{flow.name} ({flow.hash[:8]})" for flow in flows)
        raise ValueError(f"distilled: the teacher of {run.folder.path} is {name}, not one of the flows {known}")
    return places[-1]


def sampled_by(teacher: Teacher) -> str:
    """Return by which solver and how many evaluations a teacher is sampled."""
    return f"{teacher.solver_name} at {teacher.nfe()} NFE"


def real_images(packed: Any, count: int) -> Tensor:
    """Return `count` images (count, C, H, W), float32 in [-1, 1], evenly spread over a packed data set."""
    return from_uint8(packed.fetch(np.arange(count) * len(packed) // count)[0])


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
    print(f"\n{write_flow_chain(measurement.run(steps, runs()), folder)}")
    if planar(evaluation.shape):
        students = (run.method.to(device) for run in runs())
        draw_flow_paths(folder / "paths.png", flows, students, evaluation, cfg.path_steps)
        print(f"{folder}/paths.png written")


def planar(shape: Sequence[int]) -> bool:
    """Return whether images of this shape (C, H, W) are points of the plane."""
    return tuple(shape) == PLANE


def draw_flow_paths(
    path: Path, flows: Sequence[Teacher], students: Iterable[Method], evaluation: Evaluation, steps: int
) -> None:
    """Draw paths of planar data: the pairs that the first flow is trained on, each flow, each kind of curves among the students.

    All panels but the first share their noise.

    Args:
        path: The picture.
        flows: The chain.
        students: Distilled from its flows.
        evaluation: With the data.
        steps: Of a path.
    """
    packed = evaluation.data.reference()
    cloud = planar_points(real_images(packed, min(CLOUD, len(packed))))
    seeds = torch.arange(LINES, device=evaluation.device)
    noise, labels = sample_noise(seeds, evaluation.shape), sample_labels(seeds, evaluation.data.num_classes)
    chosen = sample_labels(seeds, len(packed)).cpu().numpy()
    images = from_uint8(packed.fetch(chosen)[0].to(noise.device))
    panels = [coupling_panel("noise and data, paired at random", noise, images, cloud)]
    for k, flow in enumerate(flows, 1):
        flow.to(evaluation.device)
        panels.append(flow_panel(f"flow {k}: {flow.name}", flow, noise, labels, steps, cloud))
    curves = dict(filter(None, (student.training_curves(seeds) for student in students)))  # one of each title
    panels += [bezier_panel(title, points, cloud) for title, points in curves.items()]
    plot_paths(path, panels)

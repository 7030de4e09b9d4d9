"""paths.png: the paths of a chain of flows of planar data, and what they or their students are trained on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from launch.evaluate.flow_measurement import real_images
from launch.evaluate.measure import Evaluation
from lightning_modules import BezierDistillation, Method
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise, sample_uniforms
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.images import from_uint8
from stillhouse.pictures.paths import PathPanel, bezier_panel, coupling_panel, flow_panel, planar_points, plot_paths
from stillhouse.pictures.points import PLANE

LINES = 48
CLOUD = 1000


def planar(shape: Sequence[int]) -> bool:
    return tuple(shape) == PLANE


def draw_flow_paths(
    path: Path, flows: Sequence[Teacher], students: Iterable[Method], evaluation: Evaluation, steps: int
) -> None:
    """One panel for the pairs that the first flow is trained on, one per flow, one per kind of curves among the students.

    All but the first panel share their noise.
    """
    packed = evaluation.data.reference()
    cloud = planar_points(real_images(packed, min(CLOUD, len(packed))))
    seeds = torch.arange(LINES, device=evaluation.device)
    noise, labels = sample_noise(seeds, evaluation.shape), sample_labels(seeds, evaluation.data.num_classes)
    drawn = sample_labels(seeds, len(packed)).cpu().numpy()
    images = from_uint8(packed.fetch(drawn)[0].to(noise.device))
    panels = [coupling_panel("noise and data, paired at random", noise, images, cloud)]
    for k, flow in enumerate(flows, 1):
        flow.to(evaluation.device)
        panels.append(flow_panel(f"flow {k}: {flow.name}", flow, noise, labels, steps, cloud))
    bent = {curve_title(s): s for s in students if isinstance(s, BezierDistillation)}
    panels += [curves_panel(title, student, seeds, cloud) for title, student in bent.items()]
    plot_paths(path, panels)


def curve_title(method: BezierDistillation) -> str:
    names = ", ".join(teacher.name for teacher in method.teachers)
    slots = ", ".join(dict.fromkeys(method.control_points.slots))
    return f"Bezier, order {method.control_points.order}{f', {slots}' if slots else ''}: training curves\n({names})"


def curves_panel(title: str, method: BezierDistillation, seeds: Tensor, background: Tensor | None = None) -> PathPanel:
    """The curves that a Bezier student trained on last, from the noise of seeds (N,), int64."""
    return bezier_panel(title, control_points(method, seeds), background)


def control_points(method: BezierDistillation, seeds: Tensor) -> Tensor:
    """P_0 .. P_n of the seeds (N,), int64, by the weights at the end of training: (N, n + 1, C, H, W), float64."""
    noise, labels = sample_noise(seeds, method.image_shape), sample_labels(seeds, method.teacher.num_classes)
    states = torch.stack([_states(method, teacher, noise, labels) for teacher in method.teachers], dim=1)
    weights = method.last_weights.to(seeds.device)
    return method.control_points.to(seeds.device)(noise.double(), states, weights, sample_uniforms(seeds))


def _states(method: BezierDistillation, teacher: Teacher, noise: Tensor, labels: Tensor | None) -> Tensor:
    """x = X_t / t of a teacher's path at the times that the control points ask for, then its end: (N, K, C, H, W), float64."""
    teacher.to(noise.device)
    levels = tuple(method.through)
    reached = teacher.sigmas(None, levels).tolist()[1:]
    states = dict(zip(reached, teacher.trajectory(noise, labels, through=levels), strict=True))
    return torch.stack([states[level] for level in (*levels, 0.0)], 1)

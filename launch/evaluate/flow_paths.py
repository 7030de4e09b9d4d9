"""paths.png: the paths of a chain of flows of planar data, and what they or their students are trained on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from launch.evaluate.flow_measurement import real_images
from launch.evaluate.measure import Evaluation
from lightning_modules import Method
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.images import from_uint8
from stillhouse.pictures.paths import bezier_panel, coupling_panel, flow_panel, planar_points, plot_paths
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
    curves = dict(filter(None, (student.training_curves(seeds) for student in students)))  # one of each title
    panels += [bezier_panel(title, points, cloud) for title, points in curves.items()]
    plot_paths(path, panels)

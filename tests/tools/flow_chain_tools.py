"""Flows that are known exactly, on images of shape (2, 1, 1), and a measured chain that is known by hand."""

from pathlib import Path

import torch
from torch import Tensor, nn

from closed_forms import Corrected, ExactNetwork, Mixture
from stillhouse.analysis.flow_chain import ChainedFlow, DistilledRun, FlowChain
from stillhouse.analysis.flow_errors import Estimate
from stillhouse.diffusion.preconditioning import Velocity
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.teacher import Teacher

MEAN = (0.3, -0.4)


def flow(network: nn.Module, name: str = "flow", steps: int = 100, solver: str = "flow_heun", **options) -> Teacher:
    return Teacher(name, network, Velocity(), flow_uniform, solver=solver, steps=steps, conditional=False, **options)


def gaussian_flow(mean: tuple[float, float] = MEAN, std: float = 0.5, **options) -> Teacher:
    """From noise c to N(mean, std^2 I): X_t = t mean + c sqrt(t^2 std^2 + (1 - t)^2)."""
    mixture = Mixture(torch.tensor([mean], dtype=torch.float64), std)
    return flow(Corrected(ExactNetwork("velocity", mixture)), **options)


def mixture_flow(**options) -> Teacher:
    return flow(Corrected(ExactNetwork("velocity", Mixture())), **options)


class Constant(nn.Module):
    """One velocity everywhere: a straight flow."""

    in_channels, out_channels, resolution, num_classes = 2, 2, 1, 0

    def __init__(self, velocity: tuple[float, float] = MEAN):
        super().__init__()
        self.register_buffer("velocity", torch.tensor(velocity)[:, None, None])

    def forward(self, z: Tensor, noise_labels: Tensor, class_labels=None, augment_labels=None) -> Tensor:
        return self.velocity.expand_as(z)


class PlanarExtractor:
    """The two coordinates themselves."""

    name, metric_suffix, dim, hash = "planar", "_planar", 2, "6" * 64

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 127.5 - 1

    def to(self, device) -> "PlanarExtractor":
        return self


class PlanarData:
    """Points of the mixture as a data set of bytes."""

    name, channels, resolution, num_classes, hash = "planar", 2, 1, 0, "b" * 64
    labels = None

    def __init__(self, count: int = 200):
        points = Mixture().sample(count, torch.Generator().manual_seed(3))
        self.images = (points * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def held_out(self) -> None:
        return None

    def fetch(self, indices):
        return self.images[torch.from_numpy(indices)], None

    def reference(self) -> "PlanarData":
        return self


def write_chain(folder: Path) -> Path:
    from stillhouse.analysis.flow_plot import write_flow_chain

    write_flow_chain(chain(), folder)
    return folder / "flows.json"


def chain() -> FlowChain:
    """Three flows whose step drifts have the roots 2 and 1, with students of two seeds of the last two."""

    def measured(name, step, end, straightness, w2, fid, euler):
        estimates = [value and Estimate(*value) for value in (step, end, straightness)]
        return ChainedFlow(name, "flow_heun", 19, *estimates, w2, {"fid": (fid, 0.01)}, {1: {"fid": (euler, 0.1)}})

    flows = (
        measured("rf1", None, None, (3.0, 0.1), 2.5, 0.2, 20.0),
        measured("rf2", (4.0, 0.2), (4.0, 0.2), (0.5, 0.02), 2.6, 0.3, 0.8),
        measured("rf3", (1.0, 0.1), (6.25, 0.3), (0.2, 0.01), 2.7, 0.4, 0.6),
    )

    def student(k, group, seed, r, fid):
        regression = None if r is None else Estimate(r, 0.05)
        return DistilledRun(k, f"{group}{seed}", group, seed, 1, "ema", regression, 2.8, {"fid": (fid, 0.01)})

    runs = [student(2, "flow_distill", seed, r, fid) for seed, r, fid in ((0, 0.25, 0.4), (1, 0.49, 0.5))]
    runs += [student(3, "flow_distill", 0, 1.0, 0.6), student(3, "bezier", 0, None, 0.55)]
    rest = {"samples": 2000, "path_steps": 50, "matched": 1797, "fingerprint": {"num_samples": 2000}}
    return FlowChain(flows, tuple(runs), floor={"fid": (0.1, 0.02)}, notes=("a note",), **rest)

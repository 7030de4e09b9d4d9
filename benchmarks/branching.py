"""What K branches add to a training step of the student and to sampling: seconds, and floating point operations."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CIFAR10, Case, compose_config
from benchmarks.measuring import clock, summary
from launch.run.build import build_seeded
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.networks import branches_of, widen

_SIGMA = 2.0  # any: the work is the same at all noise levels


class Student:
    """A copy of a denoiser, with `branches`, that is trained on noise and sampled from it: the same for all copies."""

    def __init__(self, denoiser: Denoiser, branches: int, noise: Tensor, labels: Tensor | None):
        self.denoiser, self.noise, self.labels = denoiser, noise, labels
        widen(denoiser.network, branches)
        self.targets = noise[:, None].expand(-1, branches, -1, -1, -1)
        self.sigma = torch.tensor(_SIGMA, device=noise.device)
        self.optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4, fused=True)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.denoiser.parameters())

    def train(self) -> None:
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        estimates = self.denoiser.branches(_SIGMA * self.noise, self.sigma, self.labels)
        (estimates - self.targets).abs().sum().div(len(self.noise)).backward()

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.denoiser(_SIGMA * self.noise, self.sigma, self.labels)


def measure(case: Case = CIFAR10, branches: int = 4) -> dict[str, Any]:
    """Two students, one of them widened, trained alternately and then evaluated alternately; in float32, without a teacher.

    A method's step has the teacher's evaluations too, so the shares of its step are smaller than these.

    Raises:
        RuntimeError: Where an evaluation of the widened network is not the plain one's, bit for bit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = compose_config(case, folder, "teacher.network.dropout=0")
        teacher = build_seeded(cfg.teacher, cfg.seed).to(device)
    seeds = torch.arange(cfg.batch_size, device=device)
    noise = sample_noise(seeds, (teacher.channels, teacher.resolution, teacher.resolution))
    labels = sample_labels(seeds, teacher.num_classes)
    plain, branched = (Student(teacher.student(), k, noise, labels) for k in (1, branches))
    if not torch.equal(plain.infer(), branched.infer()):
        raise RuntimeError(f"an evaluation of the network with {branches} branches is not the plain network's")

    step, branched_step = alternately(case, device, plain.train, branched.train)
    inference, branched_inference = alternately(case, device, plain.infer, branched.infer)
    return {
        "title": f"{branches} branches against 1, {case.title}",
        "device": str(device),
        "batch_size": cfg.batch_size,
        "parameters": plain.parameters,
        "teacher_weights": teacher.weights or "random",
        "branches": branches_of(branched.denoiser.network),
        "window_steps": case.window,
        "added_parameters": branched.parameters - plain.parameters,
        "plain_step_seconds": summary(step),
        "branched_step_seconds": summary(branched_step),
        "branched_step_over_plain": summary([b / a - 1 for a, b in zip(step, branched_step, strict=True)]),
        "plain_inference_seconds": summary(inference),
        "branched_inference_seconds": summary(branched_inference),
        "branched_inference_over_plain": summary(
            [b / a - 1 for a, b in zip(inference, branched_inference, strict=True)]
        ),
        "step_operations": {"plain": operations(plain.backward), "branched": operations(branched.backward)},
        "inference_operations": {"plain": operations(plain.infer), "branched": operations(branched.infer)},
    }


def alternately(
    case: Case, device: torch.device, first: Callable[[], Any], second: Callable[[], Any]
) -> tuple[list[float], list[float]]:
    """Seconds per call, one figure per round; the calls alternate, so that a drift of the machine meets both alike."""
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(case.warmup):
        first(), second()
    for _ in range(case.rounds):
        spent = [0.0, 0.0]
        for _ in range(case.window):
            for i, call in enumerate((first, second)):
                begun = clock(device)
                call()
                spent[i] += clock(device) - begun
        for seconds, figure in zip(spent, figures, strict=True):
            figure.append(seconds / case.window)
    return figures


def operations(call: Callable[[], Any]) -> int:
    """Floating point operations in convolutions and matrix products, forward and backward; Adam's are not counted."""
    # As plain matrix products: not every fused attention kernel is known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

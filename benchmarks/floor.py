"""What an update of score distillation cannot do without: evaluations of its networks, and the optimiser's step."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from benchmarks.measuring import clock
from lightning_modules import DiffInstruct
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise

# Update -> the networks that it evaluates, once each, and whether with gradient; those with gradient are then trained.
FLOOR = {
    "fake": {"student": False, "fake_score": True},
    "generator": {"student": True, "fake_score": False, "teacher": False},
    "both": {"student": True, "fake_score": True, "teacher": False},
}


def latest_update(method: DiffInstruct) -> str:
    """The key in FLOOR of the update that a method has just made."""
    return "both" if len(method.updating) > 1 else "generator" if method.student_updated else "fake"


def networks_of(method: DiffInstruct) -> dict[str, nn.Module]:
    return {
        "student": method.student.network,
        "fake_score": method.fake_score.network,
        "teacher": method.target.denoiser.network,
    }


class Floor:
    """Updates of bare evaluations: no noise, no loss, no preconditioning, no logs, no averages.

    Student and fake score are copies of the method's, since they are trained here too; nothing changes the teacher. All
    networks get the same noise (B, C, H, W) and labels, and the backward passes start at a fixed gradient.
    autocast: the context of the forward passes.
    """

    def __init__(self, method: DiffInstruct, autocast: Callable[[], AbstractContextManager]):
        self.device, self.autocast = method.device, autocast
        networks = networks_of(method)
        self.networks = {**networks, **{name: copy.deepcopy(networks[name]) for name in ("student", "fake_score")}}
        self.optimizers = {
            name: method.build_optimizer(self.networks[name].parameters(), fused=True)
            for name in ("student", "fake_score")
        }
        network, seeds = networks["student"], torch.arange(method.batch_size, device=self.device)
        self.noise = sample_noise(seeds, (network.in_channels, network.resolution, network.resolution))
        self.levels = torch.zeros(method.batch_size, device=self.device)
        self.labels = sample_labels(seeds, method.teacher.num_classes)
        self.gradient = self.noise / method.batch_size

    def update(self, kind: str) -> tuple[float, float]:
        """Seconds of the evaluations, forward and backward, and of the optimiser's steps after them."""
        begun = clock(self.device)
        trained = [name for name, with_gradient in FLOOR[kind].items() if with_gradient]
        for name in trained:
            self.optimizers[name].zero_grad()
        with self.autocast():
            outputs = [self.evaluate(name, with_gradient) for name, with_gradient in FLOOR[kind].items()]
        ends = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(ends, [self.gradient.to(end.dtype) for end in ends])
        evaluated = clock(self.device)
        for name in trained:
            self.optimizers[name].step()
        return evaluated - begun, clock(self.device) - evaluated

    def evaluate(self, name: str, with_gradient: bool) -> Tensor:
        with torch.set_grad_enabled(with_gradient):
            return self.networks[name](self.noise, self.levels, self.labels)


class Evaluations:
    """Counts the forward passes of a method's networks, separately by whether a gradient could flow back."""

    def __init__(self, method: DiffInstruct):
        self.counted: Counter[tuple[str, bool]] = Counter()
        for name, network in networks_of(method).items():
            network.register_forward_hook(self._counter(name))

    def _counter(self, name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def count(network: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.counted[name, output.requires_grad] += 1

        return count

    def check(self, kind: str) -> None:
        """Compare what was counted with this update's floor.

        Raises:
            RuntimeError: Where it is not the same evaluations.
        """
        if self.counted != Counter(FLOOR[kind].items()):
            counted, floor = _listed(self.counted), _listed(Counter(FLOOR[kind].items()))
            raise RuntimeError(
                f"the update {kind!r} evaluated {counted}; its floor in benchmarks/floor.py is {floor}: the method does more, or "
                "other things, than that floor says"
            )


def _listed(evaluations: Counter[tuple[str, bool]]) -> str:
    return ", ".join(
        f"{name} {number} time{'s' * (number > 1)} {'with' if with_gradient else 'without'} gradient"
        for (name, with_gradient), number in sorted(evaluations.items())
    )

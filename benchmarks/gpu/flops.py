"""How much arithmetic a training step is: each network's operations, counted once, times its counted evaluations."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.cases import ALL_METHODS, TINY
from benchmarks.methods import CYCLE, config, networks, prepared
from stillhouse.networks.compiling import eager

ENCODER = "'s encoder"  # alone, as a GAN's classifier reads it
_CYCLES = 2


class _Passes(pl.Callback):
    """Counts evaluated images by network, each as so many forward passes: a backward pass is two of them.

    That is one for the gradient by the input and one for that by the weights, of which a network that is not being trained
    has the first alone.
    """

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, network in networks(pl_module):
            network.register_forward_hook(self._hook(name, pl_module), with_kwargs=True)

    def _hook(self, name: str, method: pl.LightningModule) -> Callable[[nn.Module, tuple, dict, Tensor], None]:
        def count(network: nn.Module, inputs: tuple, options: dict, output: Tensor) -> None:
            passes = 1 if not output.requires_grad else 3 if name in method.updating else 2
            self.rows[name + ENCODER * bool(options.get("encoded"))] += passes * len(inputs[0])

        return count


@cache
def forward_passes(method: str) -> dict[str, float]:
    """Forward passes of each network that an image of the training takes, with a backward pass as two.

    They are counted in a tiny network's training on the CPU, since they depend on neither.
    """
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = config(TINY, folder, *ALL_METHODS[method], "trainer.accelerator=cpu")
        built, data, trainer = prepared(cfg, method, _CYCLES * CYCLE)
        passes = _Passes()
        trainer.callbacks.append(passes)
        trainer.fit(built, data)
    images = built.batch_size * trainer.global_step
    return {name: rows / images for name, rows in passes.rows.items()}


class CountOperations(pl.Callback):
    """Counts the floating point operations of one evaluation of each network of a method, at batch 1, as training starts.

    Attributes:
        operations: By the names in `forward_passes`, of one image.
    """

    def __init__(self) -> None:
        self.operations: dict[str, int] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with trainer.precision_plugin.train_step_context():  # which frozen networks' weights may need
            for name, network in networks(pl_module):
                self.operations[name], self.operations[name + ENCODER] = operations(network, pl_module.device)


_known: dict[Any, tuple[int, int]] = {}  # by network, of which one process sees the same many times


def operations(network: nn.Module, device: torch.device) -> tuple[int, int]:
    """Floating point operations of a network, and of its encoder alone, for one image."""
    key = (type(network), network.resolution, sum(p.numel() for p in network.parameters()))
    if key not in _known:
        image = torch.zeros(1, network.in_channels, network.resolution, network.resolution, device=device)
        inputs = (image, torch.zeros(1, device=device))
        with eager(network), torch.no_grad():
            _known[key] = (
                _counted(lambda: network(*inputs)),
                _counted(lambda: network.encode(*inputs)),
            )
    return _known[key]


def _counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

"""torch.compile and the channels-last memory format for training: faster, and the same results but for rounding."""

from collections.abc import Iterator

import pytorch_lightning as pl
import torch

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.compiling import compile_network, undo_compilation


class NetworkLayout(pl.Callback):
    """Compiles a method's networks and lays them out channels-last for training, and undoes both when it ends.

    Frozen networks too. Stored teacher samples are made before and final measurements after; measurements in training run
    uncompiled.
    """

    def __init__(self, compile: bool | str = False, channels_last: bool = False):
        """Choose the form of the networks.

        Args:
            compile: true, or the name of a torch.compile backend.
            channels_last: whether images and convolutions have their channels innermost in memory.
        """
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Here, since the processes agree next on how gradients lie in memory."""
        if stage == "fit" and self.channels_last:
            set_memory_format(pl_module, torch.channels_last)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for denoiser in all_denoisers(pl_module) if self.compile else ():
            compile_network(denoiser.network, self.compile)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            align_optimizer_state(optimizer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for denoiser in all_denoisers(pl_module) if self.compile else ():
            undo_compilation(denoiser.network)
        if stage == "fit" and self.channels_last:
            set_memory_format(pl_module, torch.contiguous_format)


def all_denoisers(method: pl.LightningModule) -> Iterator[Denoiser]:
    """The denoisers that a method evaluates in training, each once: its own, and those of its frozen networks."""
    registered = [module for module in method.modules() if isinstance(module, Denoiser)]
    frozen = [network.denoiser for network in method.frozen_networks() if isinstance(network, Teacher)]
    yield from {id(denoiser): denoiser for denoiser in (*registered, *frozen)}.values()


def set_memory_format(method: pl.LightningModule, memory_format: torch.memory_format) -> None:
    """Lay out all weights of a method in `memory_format`, those of its frozen networks too."""
    method.to(memory_format=memory_format)
    for denoiser in all_denoisers(method):
        denoiser.to(memory_format=memory_format)


@torch.no_grad()
def align_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Lay out restored moments as their weights are: a fused step reads both in the order in which they lie in memory."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

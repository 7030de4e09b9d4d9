"""torch.compile and the channels-last memory format for training: faster, and the same results but for rounding."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytorch_lightning as pl
import torch
from torch import nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.distance import Distance
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import Discriminator
from stillhouse.networks.compiling import compile_network, eager, undo_compilation, uses_cuda_graphs


class NetworkLayout(pl.Callback):
    """Compiles a method's networks and lays them out channels-last for training, and undoes both when it ends.

    Frozen networks too. Stored teacher samples are made before and final measurements after; validation and measurements in
    training run uncompiled.
    """

    def __init__(self, compile: bool | str = False, channels_last: bool = False):
        """Choose the form of the networks.

        Args:
            compile: true, a mode of torch.compile, or the name of one of its backends.
            channels_last: whether images and convolutions have their channels innermost in memory.
        """
        self.compile, self.channels_last = compile, channels_last
        self._validation = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Here, since the processes agree next on how gradients lie in memory."""
        if stage == "fit" and self.channels_last:
            set_memory_format(pl_module, torch.channels_last)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for network in all_networks(pl_module) if self.compile else ():
            compile_network(network, self.compile)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            align_optimizer_state(optimizer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if uses_cuda_graphs(self.compile):
            # What networks returned in the step before may be overwritten: nothing of it is alive but numbers made of it.
            torch.compiler.cudagraph_mark_step_begin()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for network in all_networks(pl_module) if self.compile else ():
            self._validation.enter_context(eager(network))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.compile:
            for network in all_networks(pl_module):
                undo_compilation(network)
            torch.compiler.reset()  # frees the graphs' memory, and the next training of this process begins like the first
        if stage == "fit" and self.channels_last:
            set_memory_format(pl_module, torch.contiguous_format)


def all_denoisers(method: pl.LightningModule) -> Iterator[Denoiser]:
    """The denoisers that a method evaluates in training, each once: its own, and those of its frozen networks."""
    registered = [module for module in method.modules() if isinstance(module, Denoiser)]
    teachers = [network for network in method.frozen_networks() if isinstance(network, Teacher)]
    frozen = [denoiser for teacher in teachers for denoiser in teacher.denoisers]
    yield from {id(denoiser): denoiser for denoiser in (*registered, *frozen)}.values()


def all_networks(method: pl.LightningModule) -> Iterator[nn.Module]:
    """The networks that a method evaluates in training: the denoisers', a discriminator, and LPIPS."""
    yield from {denoiser.network: None for denoiser in all_denoisers(method)}
    yield from (module for module in method.modules() if isinstance(module, Discriminator))
    distances = [network for network in method.frozen_networks() if isinstance(network, Distance)]
    yield from (distance.network for distance in distances if distance.network is not None)


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

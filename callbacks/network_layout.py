"""How networks lie in memory and are run while they train: without influence on what they compute but for rounding."""

from collections.abc import Iterator

import pytorch_lightning as pl
import torch

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.networks.compiling import compile_network, undo_compilation


class NetworkLayout(pl.Callback):
    """Puts a method's networks, the frozen ones too, into a form for training, and back when it ends.

    compile: true, or a torch.compile backend. channels_last: whether images and convolutions have their channels innermost.
    Stored teacher samples are made before, final measurements after; those in training run uncompiled.
    """

    def __init__(self, compile: bool | str = False, channels_last: bool = False):
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the processes agree on how gradients lie in memory."""
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


def all_denoisers(module: pl.LightningModule) -> Iterator[Denoiser]:
    """All that a method evaluates, each once: its own, and those of its teachers, which are not registered."""
    held = [getattr(module, "target", None), getattr(module, "teacher", None), *getattr(module, "teachers", [])]
    own = [part for part in module.modules() if isinstance(part, Denoiser)]
    yield from {id(d): d for d in (*own, *(teacher.denoiser for teacher in held if teacher is not None))}.values()


def set_memory_format(module: pl.LightningModule, form: torch.memory_format) -> None:
    module.to(memory_format=form)
    for denoiser in all_denoisers(module):
        denoiser.to(memory_format=form)


@torch.no_grad()
def align_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Lay restored moments out as their weights are: a fused step reads both in the order in which they lie in memory."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

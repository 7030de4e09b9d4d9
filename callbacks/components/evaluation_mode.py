"""Evaluation in the middle of training that changes nothing in it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytorch_lightning as pl
import torch

from callbacks.clock import Clock


@contextmanager
def evaluation_mode(pl_module: pl.LightningModule) -> Iterator[None]:
    """Evaluate inside the block as if there were no training.

    Modules are in eval mode, gradients and autocast are off (so that all is float32), and the clock of training stands
    still. Afterwards the modules' modes and the random state are as before.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    device = pl_module.device
    devices = [device] if device.type == "cuda" else []
    clock = Clock.find(pl_module.trainer)
    pl_module.eval()
    try:
        with (
            clock.stopped() if clock else nullcontext(),
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training

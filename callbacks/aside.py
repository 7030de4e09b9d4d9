"""Evaluation in the middle of training that leaves no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch


@contextmanager
def aside(pl_module: pl.LightningModule) -> Iterator[None]:
    """Eval mode, no gradients, float32 outside autocast; random state and each module's own mode return afterwards."""
    modes = [(module, module.training) for module in pl_module.modules()]
    device = pl_module.device
    devices = [device] if device.type == "cuda" else []
    pl_module.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training

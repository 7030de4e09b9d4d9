"""Inputs and weights for the tests of the U-Nets."""

import torch
from torch import nn

from stillhouse.diffusion.random_numbers import sample_noise


def randomised(network: nn.Module) -> nn.Module:
    """The network with no layer near zero, in evaluation mode."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def inputs(batch: int = 6, channels: int = 1, resolution: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, resolution, resolution, generator=generator)
    return x, torch.randn(batch, generator=generator), torch.arange(batch) % 10


def noise(seed: int, *shape: int) -> torch.Tensor:
    return sample_noise(torch.tensor([seed]), shape)[0]


def fill(network: nn.Module) -> None:
    """Every weight from its shape alone, so that another implementation can be given the same ones."""
    for name, value in network.state_dict().items():
        new = noise(value.numel(), *value.shape)
        if value.ndim == 1:
            new = 0.2 * new + (1 if name.endswith("weight") else 0)
        else:
            new = new / value[0].numel() ** 0.5
        if "qkv" in name:  # the other implementation interleaves queries, keys and values
            new = new.reshape(len(new) // 3, 3, -1).transpose(0, 1).reshape(value.shape)
        value.copy_(new)

"""Small networks of every kind, with inputs and weights."""

import torch
from torch import nn

from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.networks import MLP, DhariwalUNet, DiffusersUNet, EDM2UNet, SongUNet

IMAGES = {"resolution": 8, "in_channels": 1, "out_channels": 1, "channel_mult": (1, 2), "num_blocks": 1}
UNET = IMAGES | {"attn_resolutions": (4,), "model_channels": 16, "num_classes": 10}
SMOOTH = {"resample_filter": (1, 3, 3, 1)}
NCSNPP = SMOOTH | {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual"}
SKIP = SMOOTH | {"encoder": "skip", "decoder": "skip"}
NETWORKS = {
    "ddpmpp": (SongUNet, UNET),
    "ncsnpp": (SongUNet, UNET | NCSNPP),
    "skip": (SongUNet, UNET | SKIP),
    "adm": (DhariwalUNet, UNET | {"channels_per_head": 8}),
    "edm2": (EDM2UNet, UNET | {"channels_per_head": 8}),
    "ddpm": (DiffusersUNet, IMAGES | {"attn_resolutions": (4,), "model_channels": 8, "norm_groups": 4}),
    "mlp": (
        MLP,
        {"resolution": 1, "in_channels": 2, "out_channels": 2, "num_classes": 10, "width": 16, "num_blocks": 2},
    ),
}


def tiny(kind: str, seed: int = 0, **options) -> nn.Module:
    """A small network without dropout, none of whose layers is near zero, in evaluation mode."""
    made, defaults = NETWORKS[kind]
    torch.manual_seed(seed)
    return randomised(made(**(defaults | {"dropout": 0.0} | options)))


def inputs(network: nn.Module, batch: int = 6) -> list[torch.Tensor]:
    """x, noise labels and, where there are classes, class labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, network.in_channels, network.resolution, network.resolution, generator=generator)
    times = torch.linspace(0, 999, batch).round()
    c = times if isinstance(network, DiffusersUNet) else torch.randn(batch, generator=generator)
    return [x, c, torch.arange(batch) % 10][: 3 if network.num_classes else 2]


def randomised(network: nn.Module) -> nn.Module:
    """The network with no layer near zero, in evaluation mode."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:  # a gain
            torch.nn.init.constant_(parameter, 0.7)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


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

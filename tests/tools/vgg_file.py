"""A file like torchvision's VGG-16 weights, but random: the real ones are a download of 528 MB."""

from pathlib import Path

import torch
from torch import Tensor

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # layers' numbers in `features`
CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def vgg16_state(seed: int = 0) -> dict[str, Tensor]:
    """Names and shapes of the real state dict; all are views of 9 MB of noise, so that a file of them is as small."""
    generator = torch.Generator().manual_seed(seed)
    # At this deviation signals keep their size through the deeper layers; features are scaled to unit length anyway.
    noise = 0.03 * torch.randn(9 * 512 * 512 + 1000 * len(CONVOLUTIONS), generator=generator)
    state = {}
    for i, number in enumerate(CONVOLUTIONS):
        before, after = CHANNELS[i : i + 2]
        own = noise[1000 * i :]
        state[f"features.{number}.weight"] = own[: 9 * before * after].view(after, before, 3, 3)
        state[f"features.{number}.bias"] = own[-after:]
    for number, before, after in ((0, 25088, 4096), (3, 4096, 4096), (6, 4096, 1000)):
        state[f"classifier.{number}.weight"] = torch.zeros(1).expand(after, before)
        state[f"classifier.{number}.bias"] = torch.zeros(1).expand(after)
    return state


def write_vgg16(path: Path, published: bool = True) -> Path:
    """In the published file's old format, or in the zip format of today's torch.save."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vgg16_state(), path, _use_new_zipfile_serialization=not published)
    return path

"""Files like the published weights of CLIP and DINOv2, but random and of few layers."""

from pathlib import Path

import torch
from torch import Tensor, nn


def random(generator: torch.Generator, *shape: int, std: float = 0.1) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def write_dinov2(path: Path, width: int = 384, depth: int = 1, hidden: int = 64, grid: int = 4) -> Path:
    """A state dict with the names of dinov2_vits14_pretrain.pth."""
    g = torch.Generator().manual_seed(0)
    state = {
        "cls_token": random(g, 1, 1, width),
        "pos_embed": random(g, 1, 1 + grid**2, width),
        "mask_token": torch.zeros(1, width),
        "patch_embed.proj.weight": random(g, width, 3, 14, 14, std=0.03),
        "patch_embed.proj.bias": random(g, width),
    }
    for i in range(depth):
        layers = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, hidden),
        }
        for name, shape in layers.items():
            state[f"blocks.{i}.{name}.weight"] = random(g, *shape, std=0.05)
            state[f"blocks.{i}.{name}.bias"] = random(g, shape[0])
        for name in ("ls1.gamma", "ls2.gamma", "norm1.weight", "norm2.weight"):
            state[f"blocks.{i}.{name}"] = 1 + random(g, width)
        for name in ("norm1.bias", "norm2.bias"):
            state[f"blocks.{i}.{name}"] = random(g, width)
    state |= {"norm.weight": 1 + random(g, width), "norm.bias": random(g, width)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


class _Archive(nn.Module):
    """Parameters by their dotted names, which TorchScript can write."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                inner = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == first}
                if not hasattr(self, first):
                    self.add_module(first, _Archive(inner))
            else:
                self.register_parameter(first, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return x


def write_clip(path: Path) -> Path:
    """A TorchScript archive with the names of CLIP's image tower: width 64, one layer, patches of 16, images of 32x32."""
    from torch_fidelity.feature_extractor_clip import VisionTransformer

    torch.manual_seed(0)
    tower = VisionTransformer(input_resolution=32, patch_size=16, width=64, layers=1, heads=1, output_dim=24)
    state = {f"visual.{name}": tensor.detach().clone() for name, tensor in tower.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(_Archive(state | {"text_projection": torch.zeros(8, 24), "logit_scale": torch.zeros(1)})).save(
        path
    )
    return path

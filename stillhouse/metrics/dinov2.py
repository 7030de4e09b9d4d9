"""DINOv2's vision transformer (Oquab et al., arXiv 2304.07193), to read its published weights without running its repository."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD = 64  # channels of an attention head, in every published size
_OFFSET = 0.1  # added to the size that positions are interpolated to, as its authors' code does


class Attention(nn.Module):
    """Multi-head self-attention with heads of 64 channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.heads = dim // _HEAD
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """A gated MLP, which the largest size has in place of `MLP`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Scale(nn.Module):
    """LayerScale: a learned factor for each channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale."""

    def __init__(self, dim: int, mlp: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim), mlp
        self.ls1, self.ls2 = Scale(dim), Scale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """The backbone without registers; its state dict says how large it is, and has the published names.

    Raises:
        KeyError, RuntimeError: for a state dict of another network.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        for name in ("cls_token", "pos_embed", "mask_token"):  # the last one only in training
            self.register_parameter(name, nn.Parameter(torch.zeros(state[name].shape)))
        depth = sum(name.endswith(".norm1.weight") for name in state)
        gated = "blocks.0.mlp.w3.weight" in state
        hidden = state["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"].shape[1]
        self.blocks = nn.Sequential(*(Block(dim, (SwiGLU if gated else MLP)(dim, hidden)) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.load_state_dict(dict(state))

    def forward(self, images: Tensor) -> Tensor:
        """The normalised class token (N, D) of normalised images (N, 3, H, W), whose sides are multiples of the patch."""
        tokens = self.patch_embed["proj"](images)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(*tokens.shape[2:])
        return self.norm(self.blocks(x))[:, 0]

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings of the class token and of a grid of patches, interpolated from the trained grid.

        Returns:
            (1, 1 + rows * columns, D).
        """
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(grid.shape[1])
        if (rows, columns) == (side, side):
            return self.pos_embed
        scale = ((rows + _OFFSET) / side, (columns + _OFFSET) / side)
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([first, grid], dim=1)

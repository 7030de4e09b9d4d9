"""ADM's U-Net with the released code's names and order of layers, for the tests: a truth that shares no code with ours."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Block(nn.Module):
    """resample: 0.5, 1 or 2."""

    def __init__(self, before: int, after: int, emb: int, resample: float = 1):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * after))
        conv = nn.Conv2d(after, after, 3, padding=1)
        self.out_layers = nn.Sequential(norm(after), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def resized(self, x: Tensor) -> Tensor:
        if self.resample == 2:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == 0.5 else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(F.silu(self.in_layers[0](x))))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resized(x)) + h


class Attention(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.heads = channels // width
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, d, pixels)
        weight = (torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])).softmax(-1)
        return x + self.proj_out(torch.einsum("bhij,bhdj->bhdi", weight, v).reshape(x.shape))


class OpenAIUNet(nn.Module):
    def __init__(
        self,
        size: int,
        channels: int,
        mults: Sequence[int],
        blocks: int,
        attended: Sequence[int],
        width: int,
        classes: int,
    ):
        super().__init__()
        emb = 4 * channels
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb)
        now = mults[0] * channels
        inputs, skips = [[nn.Conv2d(3, now, 3, padding=1)]], [now]

        def attention() -> list[nn.Module]:
            return [Attention(now, width)] if size in attended else []

        for level, mult in enumerate(mults):
            for _ in range(blocks):
                block, now = Block(now, mult * channels, emb), mult * channels
                inputs.append([block, *attention()])
                skips.append(now)
            if level < len(mults) - 1:
                inputs.append([Block(now, now, emb, 0.5)])
                skips.append(now)
                size //= 2
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, inputs))
        self.middle_block = nn.ModuleList([Block(now, now, emb), Attention(now, width), Block(now, now, emb)])
        outputs = []
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                block, now = Block(now + skips.pop(), mult * channels, emb), mult * channels
                parts = [block, *attention()]
                if level and i == blocks:
                    parts.append(Block(now, now, emb, 2))
                    size *= 2
                outputs.append(parts)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, outputs))
        self.out = nn.Sequential(norm(now), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        half = self.channels // 2
        angles = timesteps.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(half).double() / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).float()) + self.label_emb(y)
        skips = []
        for parts in self.input_blocks:
            for part in parts:
                x = part(x) if isinstance(part, nn.Conv2d) else part(x, emb)
            skips.append(x)
        for part in self.middle_block:
            x = part(x, emb)
        for parts in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            for part in parts:
                x = part(x, emb)
        return self.out(x)

"""A network of one's own: residual blocks at full resolution, without the levels of a U-Net."""

import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.networks import BranchedConv2d
from stillhouse.networks.embeddings import Embedding
from stillhouse.networks.network import Network


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + shift(embedding)))): features (B, width, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.shift = nn.Linear(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(embedding)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class ResidualNet(Network):
    """`num_blocks` residual blocks of `width` features.

    `Network` checks the inputs and has the attributes that a `Denoiser` and the methods ask of a network; here are its layers.

    Args:
        resolution: Pixels of a side.
        in_channels: Of the images.
        out_channels: Of the output; a last convolution that can be widened lets B-DENSE give it branches.
        num_classes: 0 without labels.
        width: Features, a multiple of 4.
        num_blocks: Residual blocks.
        label_dropout: Share of the labels that training hides, so that the network also samples without labels.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        width: int = 32,
        num_blocks: int = 4,
        label_dropout: float = 0.0,
    ):
        super().__init__(resolution, in_channels, out_channels)
        if width % 4:
            raise ValueError(f"teacher.network.width must be a multiple of 4, got {width}")
        self.num_classes = num_classes
        self.encoder_resolution, self.encoder_channels = resolution, width
        self.embed = Embedding("positional", width, width, num_classes, 0, label_dropout)
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.head = BranchedConv2d(width, out_channels, 3, padding=1)

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, emb)
        return (x,)

    def _decode(self, features: tuple[Tensor], emb: Tensor) -> Tensor:
        return self.head(F.silu(features[-1]))

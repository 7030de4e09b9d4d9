"""A residual multilayer perceptron with the contract of the U-Nets, for images of one pixel such as points of the plane."""

import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.checks import check_choice, check_counts, check_fractions, check_labels, check_multiple
from stillhouse.networks.branching import BranchedConv2d
from stillhouse.networks.embeddings import EMBEDDINGS, Embedding
from stillhouse.networks.layers import linear, zeroed
from stillhouse.networks.network import Network


class _Block(nn.Module):
    """x + W2 silu(norm(W1 silu(norm(x)) + shift(emb))): features (B, width); starts near the identity."""

    def __init__(self, width: int, emb_channels: int, dropout: float):
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.layer_in = linear(width, width)
        self.shift = linear(emb_channels, width)
        self.norm_out = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.layer_out = linear(width, width, gain=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.layer_in(F.silu(self.norm_in(x))) + self.shift(emb)
        return x + self.layer_out(self.dropout(F.silu(self.norm_out(h))))


class MLP(Network):
    """Residual blocks between a linear stem and an output that starts at zero and can have branches.

    Args:
        resolution: 1; neighbouring pixels would mean nothing to it.
        in_channels: of the input.
        out_channels: of the output.
        num_classes: 0 without labels.
        width: features, a multiple of 4.
        num_blocks: residual blocks.
        dropout: share of hidden features in training.
        label_dropout: share of training samples whose label is hidden.
        embedding: of the noise level, "positional" or "fourier"; any preconditioning's c_noise will do.

    Raises:
        ValueError: where an option is out of range or does not fit the others.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        width: int = 128,
        num_blocks: int = 4,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        embedding: str = "positional",
    ):
        super().__init__(resolution, in_channels, out_channels)
        check_counts(
            width=width,
            num_blocks=num_blocks,
        )
        check_fractions(dropout=dropout)
        check_labels(num_classes, label_dropout)
        check_multiple(4, width=width)
        check_choice("embedding", embedding, tuple(EMBEDDINGS))
        if resolution != 1:
            raise ValueError(f"an MLP reads images of one pixel: resolution must be 1, got {resolution}; take a U-Net")
        self.num_classes = num_classes
        self.encoder_resolution, self.encoder_channels = 1, width  # of what `encode` gives

        self.embed = Embedding(embedding, width, width, num_classes, 0, label_dropout)
        self.stem = linear(in_channels, width)
        self.blocks = nn.ModuleList(_Block(width, width, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = zeroed(BranchedConv2d(width, out_channels, 1))

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor]:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x, emb)
        return (F.silu(self.norm(x))[:, :, None, None],)

    def _decode(self, features: tuple[Tensor], emb: Tensor) -> Tensor:
        return self.head(features[-1])

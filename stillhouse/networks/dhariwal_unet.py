"""The U-Net of Dhariwal & Nichol 2021 (ADM) in the form that EDM trains (Karras et al. 2022, table 7)."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.checks import (
    check_counts,
    check_fractions,
    check_integers,
    check_labels,
    check_levels,
    check_multiple,
)
from stillhouse.networks.adm_levels import ADMLevels, attention_heads
from stillhouse.networks.branching import BranchedConv2d
from stillhouse.networks.embeddings import DhariwalEmbedding
from stillhouse.networks.layers import attend, group_norm, zeroed

EPS = 1e-5  # of every group norm


class DhariwalAttention(nn.Module):
    """Self-attention with several heads over all pixels, added to its input; starts as the identity.

    The rows of `qkv.weight` (3C, C) are all queries, then all keys, then all values, in each head after head.
    (EDM's files have in each head q0, k0, v0, q1, ...)
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        h = self.proj(attend(self.qkv(pixels), self.heads))
        return x + h.transpose(1, 2).reshape(x.shape)


class DhariwalBlock(nn.Module):
    """Norm, convolution, norm scaled and shifted by the embedding, dropout, convolution, plus the input; attention after it.

    `resample` changes the resolution of both paths. `emb` is (B, emb_channels). `heads=0`: no attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        heads: int = 0,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.norm_in = group_norm(in_channels, EPS)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulate = nn.Linear(emb_channels, 2 * out_channels)
        self.norm_out = group_norm(out_channels, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = DhariwalAttention(out_channels, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_in(self.resample(F.silu(self.norm_in(x))))
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_out(h) * (1 + scale) + shift)
        h = self.conv_out(self.dropout(h))
        return self.attention(self.skip(self.resample(x)) + h)


class DhariwalUNet(ADMLevels):
    """ADM; the defaults are EDM's ImageNet-64 network but for its num_classes=1000.

    Layers start as PyTorch's do, the last one of each sum and of the network at zero.

    Args:
        resolution: of the images, divisible by 2^(levels - 1) with levels = len(channel_mult).
        in_channels: of the input.
        out_channels: of the output.
        num_classes: 0 without labels.
        augment_dim: of the augmentation's labels, 0 without.
        model_channels: a multiple of 4.
        channel_mult: channels of each level over `model_channels`.
        emb_mult: channels of the embedding over `model_channels`.
        num_blocks: residual blocks of a level in the encoder; the decoder has one more.
        attn_resolutions: resolutions of those levels that have attention, beside the lowest, which always has.
        channels_per_head: divides the channels wherever there is attention.
        dropout: share of hidden features in training.
        label_dropout: share of training samples whose label is hidden.

    Raises:
        ValueError: where an option is out of range or does not fit the others.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        emb_mult: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ):
        super().__init__(resolution, in_channels, out_channels)
        check_counts(
            model_channels=model_channels,
            emb_mult=emb_mult,
            num_blocks=num_blocks,
            channels_per_head=channels_per_head,
        )
        check_counts(0, augment_dim=augment_dim)
        check_fractions(dropout=dropout)
        check_labels(num_classes, label_dropout)
        channel_mult = check_integers("channel_mult", channel_mult)
        attn_resolutions = check_integers("attn_resolutions", attn_resolutions)
        check_levels(resolution, channel_mult, attn_resolutions)
        check_multiple(4, model_channels=model_channels)
        levels = [(resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        heads = attention_heads(levels, attn_resolutions, channels_per_head)
        self.num_classes = num_classes
        self.augment_dim = augment_dim

        emb_channels = model_channels * emb_mult
        self.embed = DhariwalEmbedding(model_channels, emb_channels, num_classes, augment_dim, label_dropout)
        block = partial(DhariwalBlock, emb_channels=emb_channels, dropout=dropout)

        self.stem = nn.Conv2d(in_channels, levels[0][1], 3, padding=1)
        width = self.build_levels(
            levels, heads, channels_per_head, num_blocks, encoder_block=lambda _: block, decoder_block=lambda _: block
        )
        self.norm_out = group_norm(width, EPS)
        self.conv_out = zeroed(BranchedConv2d(width, out_channels, 3, padding=1))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        return self._encoded_from(self.stem(x), emb)

    def _decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self._decoded_to(features, emb))))

"""The U-Nets of Song et al. 2021 (score SDE) in the form that EDM trains (Karras et al. 2022, table 7).

DDPM++: positional embedding, standard encoder and decoder, resample filter (1, 1).
NCSN++: Fourier embedding with channel_mult_noise=2, residual encoder, resample filter (1, 3, 3, 1).
EDM's CIFAR-10 networks have channel_mult (2, 2, 2); its 64x64 networks (1, 2, 2, 2).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.checks import (
    check_choice,
    check_counts,
    check_fractions,
    check_integers,
    check_labels,
    check_levels,
    check_multiple,
)
from stillhouse.networks.branching import BranchedConv2d
from stillhouse.networks.embeddings import EMBEDDINGS, Embedding
from stillhouse.networks.layers import SQRT_HALF, Downsample, ResidualBlock, Upsample, conv, group_norm, initialised
from stillhouse.networks.network import Network

ENCODERS = ("standard", "residual", "skip")
DECODERS = ("standard", "skip")
RESAMPLE_FILTERS = ((1, 1), (1, 3, 3, 1))


class ImageInjection(nn.Module):
    """Encoder "skip": the shrunken input image, mixed linearly, is added to the features of each lower resolution."""

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[int]):
        super().__init__()
        self.down = Downsample(taps)
        self.conv = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        side = self.down(side)
        return x + self.conv(side), side


class PyramidInjection(nn.Module):
    """Encoder "residual": features of the resolution above, convolved and shrunk, are added to those of this one."""

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[int]):
        super().__init__()
        # The border that the filter needs is computed by the convolution, not set to zero after it.
        self.conv = conv(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.down = Downsample(taps, padded=False)

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        x = (x + self.down(self.conv(side))) * SQRT_HALF
        return x, x


class EncoderLevel(nn.Module):
    """One resolution on the way down; `side` is what an injection carries past the blocks."""

    def __init__(self, down: ResidualBlock | None, inject: nn.Module | None, blocks: list[ResidualBlock]):
        super().__init__()
        self.down = down
        self.inject = inject
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, side: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the features that the decoder will concatenate, the last of them the output; and the new `side`."""
        if self.down is not None:
            x = self.down(x, emb)
        if self.inject is not None:
            x, side = self.inject(x, side)
        features = [x]
        for block in self.blocks:
            features.append(block(features[-1], emb))
        return features, side


class DecoderLevel(nn.Module):
    """One resolution on the way up: `entry` (the middle blocks, or the upsampling one), then one block per skip."""

    def __init__(self, entry: list[ResidualBlock], blocks: list[ResidualBlock]):
        super().__init__()
        self.entry = nn.ModuleList(entry)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        for block in self.entry:
            x = block(x, emb)
        for block in self.blocks:
            x = block(self.join(x, skips.pop()), emb)
        return x

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([x, skip], dim=1)


class Head(nn.Module):
    """The last layers, from features to output channels; starts near zero."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = group_norm(in_channels)
        self.conv = initialised(BranchedConv2d(in_channels, out_channels, 3, padding=1), gain=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class SongUNet(Network):
    """DDPM++, NCSN++ and what lies between them.

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
        attn_resolutions: resolutions of those levels that have attention.
        dropout: share of hidden features in training.
        label_dropout: share of training samples whose label is hidden.
        embedding: of the noise level, "positional" or "fourier".
        channel_mult_noise: channels of the noise level's waves over `model_channels`.
        encoder: "standard"; "residual" adds the features of the level above to each level, "skip" the image.
        decoder: "standard"; "skip" sums the outputs of all levels.
        resample_filter: (1, 1) or (1, 3, 3, 1).

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
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        emb_mult: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding: str = "positional",
        channel_mult_noise: int = 1,
        encoder: str = "standard",
        decoder: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__(resolution, in_channels, out_channels)
        check_counts(
            model_channels=model_channels,
            emb_mult=emb_mult,
            num_blocks=num_blocks,
            channel_mult_noise=channel_mult_noise,
        )
        check_counts(0, augment_dim=augment_dim)
        check_fractions(dropout=dropout)
        check_labels(num_classes, label_dropout)
        channel_mult = check_integers("channel_mult", channel_mult)
        attn_resolutions = check_integers("attn_resolutions", attn_resolutions)
        taps = check_integers("resample_filter", resample_filter)
        check_choice("embedding", embedding, tuple(EMBEDDINGS))
        check_choice("encoder", encoder, ENCODERS)
        check_choice("decoder", decoder, DECODERS)
        check_choice("resample_filter", taps, RESAMPLE_FILTERS)
        check_levels(resolution, channel_mult, attn_resolutions)
        check_multiple(4, model_channels=model_channels)
        self.num_classes = num_classes
        self.augment_dim = augment_dim

        emb_channels = model_channels * emb_mult
        self.embed = Embedding(
            embedding, model_channels * channel_mult_noise, emb_channels, num_classes, augment_dim, label_dropout
        )
        block = partial(ResidualBlock, emb_channels=emb_channels, dropout=dropout)
        levels = [(resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]

        self.stem = conv(in_channels, model_channels, 3)
        self.encoder = nn.ModuleDict()
        width, side_width, skip_widths = model_channels, in_channels, []
        for size, channels in levels:
            down = inject = None
            if size < resolution:
                down = block(width, width, resample=Downsample(taps))
                if encoder == "skip":
                    inject = ImageInjection(in_channels, width, taps)
                elif encoder == "residual":
                    inject = PyramidInjection(side_width, width, taps)
                    side_width = width
            skip_widths.append(width)
            blocks = []
            for _ in range(num_blocks):
                blocks.append(block(width, channels, attention=size in attn_resolutions))
                width = channels
                skip_widths.append(width)
            self.encoder[str(size)] = EncoderLevel(down, inject, blocks)
        self.encoder_resolution, self.encoder_channels = size, width  # of what `encode` gives

        self.decoder = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for size, channels in reversed(levels):
            if size == levels[-1][0]:
                entry = [block(width, width, attention=True), block(width, width)]
            else:
                entry = [block(width, width, resample=Upsample(taps))]
            blocks = []
            for i in range(num_blocks + 1):
                attention = i == num_blocks and size in attn_resolutions
                blocks.append(block(width + skip_widths.pop(), channels, attention=attention))
                width = channels
            self.decoder[str(size)] = DecoderLevel(entry, blocks)
            if decoder == "skip" or size == resolution:
                self.heads[str(size)] = Head(width, out_channels)
        self.grow = Upsample(taps)  # the output so far, to the next head's resolution (decoder="skip")

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        side, skips = x, []
        x = self.stem(x)
        for level in self.encoder.values():
            features, side = level(x, side, emb)
            skips += features
            x = features[-1]
        return skips

    def _decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        x, out = features[-1], None
        for size, level in self.decoder.items():
            x = level(x, features, emb)
            if size in self.heads:
                head = self.heads[size](x)
                out = head if out is None else head + self.grow(out)
        return out

"""The encoder and decoder of ADM (arXiv 2105.05233), which EDM2's network has too: levels of blocks, and skips between them."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stillhouse.networks.layers import Downsample, Upsample
from stillhouse.networks.network import Network
from stillhouse.networks.song_unet import DecoderLevel

Blocks = Callable[[int], Callable[..., nn.Module]]
"""From a resolution to what makes its blocks, of their channels before and after, and by name `heads` and `resample`."""


class ADMLevels(Network):
    """Base of networks whose levels have blocks of their own: attention at some resolutions and at the entry of the lowest one.

    Attributes:
        encoder: the blocks of each resolution, from the highest to the lowest.
        decoder: the `DecoderLevel` of each, from the lowest to the highest.
    """

    encoder: nn.ModuleDict
    decoder: nn.ModuleDict

    def build_levels(
        self,
        levels: Sequence[tuple[int, int]],
        heads: dict[int, int],
        channels_per_head: int,
        num_blocks: int,
        encoder_block: Blocks,
        decoder_block: Blocks,
        decoder_level: type[DecoderLevel] = DecoderLevel,
    ) -> int:
        """Make encoder and decoder, whose input has the channels of the first level.

        Args:
            levels: resolution and channels of each, descending.
            heads: of attention at each resolution, as `attention_heads` counts them.
            channels_per_head: of the entry of the lowest level.
            num_blocks: of a level in the encoder; the decoder has one more.
            encoder_block: see `Blocks`.
            decoder_block: likewise.
            decoder_level: the class of the decoder's levels.

        Returns:
            The channels at the end of the decoder.
        """
        width = levels[0][1]
        self.encoder = nn.ModuleDict()
        skip_widths = [width]
        for size, channels in levels:
            block, blocks = encoder_block(size), []
            if size < self.resolution:
                blocks.append(block(width, width, resample=Downsample((1, 1))))
                skip_widths.append(width)
            for _ in range(num_blocks):
                blocks.append(block(width, channels, heads=heads[size]))
                width = channels
                skip_widths.append(width)
            self.encoder[str(size)] = nn.ModuleList(blocks)
        self.encoder_resolution, self.encoder_channels = size, width  # of what `encode` gives

        self.decoder = nn.ModuleDict()
        for size, channels in reversed(levels):
            block = decoder_block(size)
            if size == self.encoder_resolution:
                entry = [block(width, width, heads=width // channels_per_head), block(width, width)]
            else:
                entry = [block(width, width, resample=Upsample((1, 1)))]
            blocks = []
            for _ in range(num_blocks + 1):
                blocks.append(block(width + skip_widths.pop(), channels, heads=heads[size]))
                width = channels
            self.decoder[str(size)] = decoder_level(entry, blocks)
        return width

    def _encoded_from(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Go through the encoder from the stem's features on; all that the decoder reads."""
        skips = [x]
        for level in self.encoder.values():
            for block in level:
                skips.append(block(skips[-1], emb))
        return skips

    def _decoded_to(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """Go through the decoder, up to the last layers."""
        x = features[-1]
        for level in self.decoder.values():
            x = level(x, features, emb)
        return x


def attention_heads(
    levels: Sequence[tuple[int, int]], attn_resolutions: Sequence[int], channels_per_head: int
) -> dict[int, int]:
    """Count the heads of attention at each resolution, 0 where there is none.

    Args:
        levels: resolution and channels of each, descending; the last one has attention in any case.
        attn_resolutions: the others that have.
        channels_per_head: of each head.

    Raises:
        ValueError: where it does not divide the channels.
    """
    for size, channels in levels:
        if size in (*attn_resolutions, levels[-1][0]) and channels % channels_per_head:
            raise ValueError(
                f"channels_per_head={channels_per_head} must divide the {channels} channels at resolution {size}, "
                "which has attention; change it, model_channels or attn_resolutions"
            )
    return {size: channels // channels_per_head if size in attn_resolutions else 0 for size, channels in levels}

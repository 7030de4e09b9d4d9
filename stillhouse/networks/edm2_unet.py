"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2023, arXiv 2312.02696, figure 21)."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.checks import check_counts, check_fractions, check_integers, check_labels, check_levels
from stillhouse.networks.adm_levels import ADMLevels, attention_heads
from stillhouse.networks.embeddings import ConditionEmbedding
from stillhouse.networks.song_unet import DecoderLevel

EPS = 1e-4  # added to a magnitude before it is divided by
_SILU_MAGNITUDE = 0.596  # of silu of unit normal numbers


def unit_magnitude(x: Tensor, dims: int | Sequence[int]) -> Tensor:
    """Divide by the root mean square over some dimensions, which is taken in float32 at least."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=precise)
    return x / (EPS + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of unit magnitude (equation 81)."""
    return F.silu(x) / _SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Blend a to b of unit magnitude (equation 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate the channels of a and b, which contribute as 1 - t to t whatever their number (equation 103)."""
    channels = a.shape[1], b.shape[1]
    scale = math.sqrt(sum(channels)) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(channels[0])), b * (scale * t / math.sqrt(channels[1]))], 1)


class MPFourier(nn.Module):
    """Cosines of unit magnitude of the noise label (B,) at random frequencies and phases, drawn once (equation 75)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise_labels: Tensor) -> Tensor:
        return (torch.outer(noise_labels, self.freqs) + self.phases).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution without bias, or a linear layer (kernel 0), whose output has its input's magnitude (equation 47).

    The weights act as if each output's had unit magnitude. Training also sets them so before each step, by `normalise`
    (forced weight normalisation, equation 66): the optimiser then moves them by angles alone.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel] * (2 if kernel else 0)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = unit_magnitude(self.weight, tuple(range(1, self.weight.ndim)))
        weight = (weight * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give each output's weights unit magnitude, in place."""
        self.weight.copy_(unit_magnitude(self.weight, tuple(range(1, self.weight.ndim))))


class EDM2Embedding(ConditionEmbedding):
    """Noise label and class of each sample as one vector (B, emb_channels), in full precision always.

    Args:
        noise_channels: of the noise label's waves.
        emb_channels: of the vector.
        num_classes: 0 without labels.
        label_dropout: share of training samples whose label is hidden.
        label_balance: the share of the class, between 0 and 1.
    """

    def __init__(
        self, noise_channels: int, emb_channels: int, num_classes: int, label_dropout: float, label_balance: float
    ):
        super().__init__(num_classes, label_dropout)
        self.label_balance = label_balance
        self.waves = MPFourier(noise_channels)
        self.layer1 = MPConv(noise_channels, emb_channels, 0)
        self.label = MPConv(num_classes, emb_channels, 0) if num_classes else None

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        span: Tensor | None = None,
    ) -> Tensor:
        with torch.autocast(noise_labels.device.type, enabled=False):
            emb = self.layer1(self.waves(noise_labels).to(self.layer1.weight.dtype))
            if self.label is not None:
                classes = self.classes(class_labels, emb)
                emb = mp_sum(emb, self.label(classes * math.sqrt(self.num_classes)), self.label_balance)
            return mp_silu(self.conditioned(emb, span))


class EDM2Attention(nn.Module):
    """Self-attention with several heads over all pixels, of queries, keys and values of unit magnitude; added to its input.

    The rows of `qkv.weight` (3C, C, 1, 1) are all queries, then all keys, then all values, in each head after head.
    (EDM2's files have in each head q0, k0, v0, q1, ...)
    """

    def __init__(self, channels: int, heads: int, balance: float):
        super().__init__()
        self.heads = heads
        self.balance = balance
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = (
            self.qkv(x).flatten(2).unflatten(1, (3 * self.heads, -1)).transpose(2, 3)
        )  # (B, 3 heads, H*W, C / heads)
        q, k, v = unit_magnitude(pixels, 3).chunk(3, dim=1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return mp_sum(x, self.proj(h), self.balance)


class EDM2Block(nn.Module):
    """A residual block of the encoder, whose input is brought to unit magnitude, or of the decoder; attention after it.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        emb_channels: of the embedding (B, emb_channels).
        encoder: whether it is one of the encoder's.
        dropout: share of hidden features in training.
        heads: of attention; 0: none.
        resample: `Upsample` or `Downsample`, before all else.
        balance: the share of the residual, and of attention, in their sums with the input.
        clip: the largest absolute value of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        encoder: bool,
        dropout: float = 0.0,
        heads: int = 0,
        resample: nn.Module | None = None,
        balance: float = 0.3,
        clip: float = 256.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.balance = balance
        self.clip = clip
        self.resample = nn.Identity() if resample is None else resample
        self.gain = nn.Parameter(torch.zeros(()))
        self.conv_in = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.modulate = MPConv(emb_channels, out_channels, 0)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = MPConv(out_channels, out_channels, 3)
        self.skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = EDM2Attention(out_channels, heads, balance) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resample(x).to(x.dtype)  # autocast enlarges in float32 on a GPU
        if self.encoder:
            x = unit_magnitude(self.skip(x), 1)
        h = self.conv_in(mp_silu(x))
        h = mp_silu(h * (self.modulate(emb, self.gain) + 1)[:, :, None, None].to(h.dtype))
        h = self.conv_out(self.dropout(h))
        x = mp_sum(x if self.encoder else self.skip(x), h, self.balance)
        return self.attention(x).clamp(-self.clip, self.clip)


class EDM2UNet(ADMLevels):
    """EDM2's network; the defaults are those of its size S but for num_classes=1000.

    Its output starts at zero, by a gain. Channels: 128 XS, 192 S, 256 M, 320 L, 384 XL, 448 XXL.

    Args:
        resolution: of the images, divisible by 2^(levels - 1) with levels = len(channel_mult).
        in_channels: of the input.
        out_channels: of the output.
        num_classes: 0 without labels.
        model_channels: at full resolution.
        channel_mult: channels at each level, in multiples of model_channels; each level halves the resolution.
        num_blocks: residual blocks of each level.
        attn_resolutions: resolutions that have self-attention, beside the lowest one's entry of the decoder.
        channels_per_head: divides the channels wherever there is attention.
        dropout: share of hidden features in training.
        dropout_resolution: the highest resolution of blocks with dropout; None: all.
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
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        label_dropout: float = 0.0,
    ):
        super().__init__(resolution, in_channels, out_channels)
        check_counts(model_channels=model_channels, num_blocks=num_blocks, channels_per_head=channels_per_head)
        check_fractions(dropout=dropout)
        check_labels(num_classes, label_dropout)
        channel_mult = check_integers("channel_mult", channel_mult)
        attn_resolutions = check_integers("attn_resolutions", attn_resolutions)
        check_levels(resolution, channel_mult, attn_resolutions)
        levels = [(resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        heads = attention_heads(levels, attn_resolutions, channels_per_head)
        self.num_classes = num_classes
        emb_channels = max(channels for _, channels in levels)
        self.embed = EDM2Embedding(levels[0][1], emb_channels, num_classes, label_dropout, label_balance=0.5)
        limit = resolution if dropout_resolution is None else dropout_resolution

        def blocks(size: int, encoder: bool) -> Callable[..., EDM2Block]:
            share = dropout if size <= limit else 0.0
            return partial(EDM2Block, emb_channels=emb_channels, encoder=encoder, dropout=share)

        self.stem = MPConv(in_channels + 1, levels[0][1], 3)
        width = self.build_levels(
            levels,
            heads,
            channels_per_head,
            num_blocks,
            encoder_block=partial(blocks, encoder=True),
            decoder_block=partial(blocks, encoder=False),
            decoder_level=EDM2DecoderLevel,
        )
        self.gain = nn.Parameter(torch.zeros(()))
        self.conv_out = MPConv(width, out_channels, 3)

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        ones = torch.ones_like(x[:, :1])  # in the place of a bias
        return self._encoded_from(self.stem(torch.cat([x, ones], 1)), emb)

    def _decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        return self.conv_out(self._decoded_to(features, emb), self.gain)


class EDM2DecoderLevel(DecoderLevel):
    """One resolution of the decoder, in which features and skips count alike."""

    balance = 0.5

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        return mp_cat(x, skip, self.balance)


def normalised_layers(network: nn.Module) -> list[MPConv]:
    """List the layers of a network whose weights training keeps at unit magnitude; of other networks than EDM2's none."""
    return [module for module in network.modules() if isinstance(module, MPConv)]

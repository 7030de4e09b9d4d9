"""Building blocks of the U-Nets: initialised layers, resampling, attention and the residual block.

Everything works on images (B, C, H, W) in either memory format and keeps the one it is given.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Sums of two signals of unit variance are scaled back to unit variance.
SQRT_HALF = math.sqrt(0.5)


def conv(in_channels: int, out_channels: int, kernel: int, gain: float = 1.0, padding: int | None = None) -> nn.Conv2d:
    """Make a convolution, Glorot uniform times `gain`, zero bias; it keeps the resolution unless `padding` says otherwise."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2 if padding is None else padding)
    return initialised(layer, gain)


def linear(in_features: int, out_features: int, gain: float = 1.0, bias: bool = True) -> nn.Linear:
    """Make a fully connected layer, Glorot uniform times `gain`, zero bias."""
    return initialised(nn.Linear(in_features, out_features, bias=bias), gain)


def initialised(layer, gain: float = 1.0):
    """Initialise a layer in place: weights Glorot uniform times `gain`, bias zero. Returns the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def zeroed(layer):
    """Set all weights of a layer to zero, in place. Returns the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """Make a group norm with as many equal groups as possible, up to 32, of at least 4 channels."""
    groups = next(n for n in range(min(32, channels // 4), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


class _Resample(nn.Module):
    """Base of resampling layers: the separable filter `taps` as a kernel (1, 1, k, k) of unit sum, not part of the weights."""

    def __init__(self, taps: Sequence[int]):
        super().__init__()
        self.box = tuple(taps) == (1, 1)
        self.padding = (len(taps) - 1) // 2
        row = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("kernel", (torch.outer(row, row) / row.sum() ** 2)[None, None], persistent=False)

    def _per_channel(self, x: Tensor) -> Tensor:
        return self.kernel.expand(x.shape[1], 1, -1, -1)


class Downsample(_Resample):
    """Halve the resolution: low-pass filter, then keep every second pixel. (1, 1) is average pooling.

    Beyond the border the image is zero; with `padded=False` the caller has put the border there already.
    """

    def __init__(self, taps: Sequence[int], padded: bool = True):
        super().__init__(taps)
        if not padded:
            self.padding = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._per_channel(x), stride=2, padding=self.padding, groups=x.shape[1])


class Upsample(_Resample):
    """Double the resolution: zeros between the pixels, then the filter with gain 4. (1, 1) is nearest neighbour."""

    def __init__(self, taps: Sequence[int]):
        super().__init__(taps)
        self.kernel *= 4

    def forward(self, x: Tensor) -> Tensor:
        if self.box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv_transpose2d(x, self._per_channel(x), stride=2, padding=self.padding, groups=x.shape[1])


def attend(qkv: Tensor, heads: int = 1) -> Tensor:
    """Let N places attend to each other.

    Args:
        qkv: (B, N, 3C); channels are all queries, then keys, then values, and in each of the three head after head.
        heads: divides C.

    Returns:
        (B, N, C).
    """
    q, k, v = qkv.unflatten(2, (3 * heads, -1)).transpose(1, 2).chunk(3, dim=1)  # each (B, heads, N, C / heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention with one head over all pixels, added to its input and scaled back to unit variance.

    The rows of `qkv.weight` (3C, C) are all queries, then all keys, then all values, so that each is contiguous over
    its channels in any memory format, as fused kernels need it. (EDM's files interleave them: q0, k0, v0, q1, ...)
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = linear(channels, 3 * channels, gain=math.sqrt(0.2))
        self.proj = linear(channels, channels, gain=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        h = self.proj(attend(self.qkv(pixels)))
        return (x + h.transpose(1, 2).reshape(x.shape)) * SQRT_HALF


class ResidualBlock(nn.Module):
    """Norm, convolution, embedding added, norm, dropout, convolution, plus the input; then attention, where there is any.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        emb_channels: of the embedding (B, emb_channels).
        dropout: share of hidden features in training.
        attention: whether attention follows.
        resample: `Upsample` or `Downsample`, which changes the resolution of both paths.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        attention: bool = False,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.norm_in = group_norm(in_channels)
        self.conv_in = conv(in_channels, out_channels, 3)
        self.shift = linear(emb_channels, out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(out_channels, out_channels, 3, gain=1e-5)  # starts as the identity
        changes = resample is not None or in_channels != out_channels
        self.skip = conv(in_channels, out_channels, 1) if changes else nn.Identity()
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_in(self.resample(F.silu(self.norm_in(x))))
        h = F.silu(self.norm_out(h + self.shift(emb)[:, :, None, None]))
        h = self.conv_out(self.dropout(h))
        return self.attention((self.skip(self.resample(x)) + h) * SQRT_HALF)

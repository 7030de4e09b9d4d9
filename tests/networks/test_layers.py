import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse.networks.embeddings import FourierEmbedding, PositionalEmbedding
from stillhouse.networks.layers import Attention, Downsample, ResidualBlock, Upsample, conv, group_norm, linear

FILTERS = [(1, 1), (1, 3, 3, 1)]


def upfirdn_1d(size: int, taps: tuple[int, ...], up: int, down: int) -> torch.Tensor:
    """Matrix of: insert zeros, convolve with taps / sum * up, keep every `down`-th, symmetric about the pixel grid."""
    out_size = size * up // down
    matrix = torch.zeros(out_size, size, dtype=torch.float64)
    for o in range(out_size):
        # Centres in units of the finer grid; pixel i covers [i, i + 1) of its own grid.
        centre_out = (o + 0.5) * down - 0.5
        for i in range(size):
            centre_in = i * up  # the pixel is the first of the `up` positions that it owns
            for k, tap in enumerate(taps):
                # An even filter sits between grid points: for up it leads the zeros, for down it straddles the pair.
                offset = k - (len(taps) - 1) / 2 + (0.5 if up == 2 else 0.0)
                if abs(centre_in + offset - centre_out) < 1e-9:
                    matrix[o, i] += tap / sum(taps) * up
    return matrix


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize(("kind", "up", "down"), [(Upsample, 2, 1), (Downsample, 1, 2)])
def test_resampling_is_the_separable_matrix_of_its_definition(taps, kind, up, down):
    x = torch.randn(2, 5, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = upfirdn_1d(8, taps, up, down), upfirdn_1d(12, taps, up, down)
    torch.testing.assert_close(kind(taps).double()(x), rows @ x @ columns.T)


def test_box_filter_is_average_pooling_and_nearest_neighbour():
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(Downsample((1, 1))(x), F.avg_pool2d(x, 2))
    torch.testing.assert_close(Upsample((1, 1))(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_smooth_filter_is_bilinear_inside_and_zero_beyond_the_border():
    x = torch.randn(2, 3, 8, 8)
    up = Upsample((1, 3, 3, 1))(x)
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up[..., 1:-1, 1:-1], bilinear[..., 1:-1, 1:-1])
    constant = torch.ones(1, 1, 8, 8)
    assert Upsample((1, 3, 3, 1))(constant)[0, 0, 0, 0] == 0.75**2
    assert Downsample((1, 3, 3, 1))(constant)[0, 0, 0, 0] == (7 / 8) ** 2
    assert (Downsample((1, 3, 3, 1), padded=False)(constant) == 1).all()


def test_filters_are_no_weights():
    assert not list(Downsample((1, 3, 3, 1)).state_dict())
    assert not list(Upsample((1, 3, 3, 1)).state_dict())


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    channels = 24
    layer = Attention(channels)
    torch.nn.init.normal_(layer.qkv.weight, std=0.3)
    torch.nn.init.normal_(layer.qkv.bias)
    torch.nn.init.normal_(layer.proj.weight, std=0.3)
    x = torch.randn(2, channels, 4, 6)
    h = layer.norm(x).reshape(2, channels, 24)
    q, k, v = (
        torch.einsum("oc,bcp->bop", layer.qkv.weight[i : i + channels], h) + layer.qkv.bias[i : i + channels, None]
        for i in (0, channels, 2 * channels)
    )
    weights = (torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(channels)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    h = torch.einsum("bqk,bck->bcq", weights, v)
    h = torch.einsum("oc,bcp->bop", layer.proj.weight, h) + layer.proj.bias[:, None]
    expected = (x + h.reshape(x.shape)) / math.sqrt(2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_positional_embedding_is_sines_then_cosines():
    labels = torch.tensor([0.0, 1.5, 999.0])
    frequencies = [10000 ** (-i / 3) for i in range(4)]
    expected = torch.tensor([[f(t * w) for f in (math.sin, math.cos) for w in frequencies] for t in labels.tolist()])
    torch.testing.assert_close(PositionalEmbedding(8)(labels), expected, rtol=0, atol=1e-4)


def test_fourier_embedding_draws_its_frequencies_into_the_weights():
    torch.manual_seed(0)
    layer = FourierEmbedding(4096)
    assert layer.freqs.std().item() == pytest.approx(16, rel=0.05)
    assert list(layer.state_dict()) == ["freqs"]
    layer.freqs.copy_(torch.linspace(-3, 3, 2048))
    angles = 2 * math.pi * torch.tensor([[0.3]]) * layer.freqs
    torch.testing.assert_close(layer(torch.tensor([0.3])), torch.cat([angles.sin(), angles.cos()], 1))


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (24, 6), (96, 24), (128, 32), (144, 24), (512, 32)])
def test_group_count(channels, groups):
    layer = group_norm(channels)
    assert (layer.num_groups, layer.eps) == (groups, 1e-6)


def test_initial_weights_have_the_glorot_range_times_gain():
    torch.manual_seed(0)
    for layer, bound in (
        (conv(16, 48, 3), math.sqrt(6 / (9 * 64))),
        (conv(16, 48, 3, gain=1e-5), 1e-5 * math.sqrt(6 / (9 * 64))),
        (linear(100, 200), math.sqrt(6 / 300)),
        (Attention(64).qkv, math.sqrt(0.2 * 6 / 256)),
        (Attention(64).proj, 1e-5 * math.sqrt(6 / 128)),
    ):
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_residual_block_starts_as_the_scaled_identity():
    torch.manual_seed(0)
    block = ResidualBlock(32, 32, 64, attention=True).eval()
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(2, 64)), x / 2, rtol=0, atol=1e-3)

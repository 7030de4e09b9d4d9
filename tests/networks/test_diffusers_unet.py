import copy
import subprocess
import sys

import pytest
import torch
from network_tools import inputs, randomised

from stillhouse.networks import (
    DiffusersUNet,
    branches_of,
    collapse,
    condition_on_steps,
    fixed_steps_state,
    reading_all,
    set_steps,
    widen,
)

TINY = {"resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1, 2)}
TINY |= {"num_blocks": 1, "attn_resolutions": (4,), "norm_groups": 4, "dropout": 0.0}


def tiny(**options) -> DiffusersUNet:
    torch.manual_seed(0)
    return randomised(DiffusersUNet(**{**TINY, **options}))


def times(batch: int = 6) -> torch.Tensor:
    return torch.linspace(0, 999, batch).round()


@pytest.mark.parametrize(
    ("resolution", "channel_mult", "count"),
    [
        (32, (1, 2, 2, 2), 35_746_307),
        (64, (1, 2, 2, 2, 4), 78_700_803),
        (256, (1, 1, 2, 2, 4, 4), 113_673_219),
    ],
)
def test_parameter_counts_of_the_published_networks(resolution, channel_mult, count):
    """35.7 and 113.7 million (DDPM, arXiv 2006.11239, appendix B), 78.7 million (DDIM's CelebA)."""
    with torch.device("meta"):
        network = DiffusersUNet(resolution, 3, 3, channel_mult=channel_mult)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    "options", [{}, {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-5}]
)
def test_output_is_that_of_diffusers(options):
    from diffusers import UNet2DModel

    network = tiny(**options)
    names = {"embed.layer1": "time_embedding.linear_1", "embed.layer2": "time_embedding.linear_2"}
    state = {}
    for name, value in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        state[f"{names.get(layer, layer)}.{leaf}"] = value
    theirs = UNet2DModel(**network.config).eval()
    theirs.load_state_dict(state)
    x, *_ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(network(x, times()), theirs(x, times()).sample, rtol=0, atol=1e-5)
        assert network(x, times()).std() > 0.1


def test_labels_are_refused():
    x, _, labels = inputs()
    with pytest.raises(ValueError, match="unconditional network"):
        tiny()(x, times(), labels)
    with pytest.raises(ValueError, match=r"augment_dim=0\); pass None"):
        tiny()(x, times(), None, torch.zeros(6, 9))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\)"):
        tiny().encode(x[:, :, :4], times())


def test_encode_gives_what_the_decoder_gets():
    network = tiny(channel_mult=(1, 3))
    x, *_ = inputs()
    entered = []
    network.mid_block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        network(x, times())
        features = network.encode(x, times())
    assert torch.equal(features, entered[0])
    assert features.shape == (6, network.encoder_channels, network.encoder_resolution, network.encoder_resolution)
    assert (network.encoder_channels, network.encoder_resolution) == (24, 4)
    features = tiny().encode(x, times())
    features.sum().backward()


def test_every_parameter_has_a_gradient():
    network = tiny().train()
    network(inputs()[0], times()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_branches_widen_and_collapse():
    network, x = tiny(), inputs()[0]
    with torch.no_grad():
        expected = network(x, times())
        widen(network, 3)
        assert branches_of(network) == 3
        with reading_all(network):
            out = network(x, times())
        assert torch.equal(out, expected.repeat(1, 3, 1, 1))
        collapse(network)
        assert torch.equal(network(x, times()), expected)


def test_it_can_know_its_number_of_steps():
    network, plain, x = tiny(), tiny(), inputs()[0]
    with torch.no_grad():
        expected = network(x, times())
        condition_on_steps(network, 4)
        assert torch.equal(network(x, times()), expected)
        network.embed.steps.layer2.weight.normal_(std=0.1)
        four = network(x, times())
        set_steps(network, 5)
        assert ((network(x, times()) - four).abs().amax((1, 2, 3)) > 1e-3).all()
        plain.load_state_dict(fixed_steps_state(network, 4))
        torch.testing.assert_close(plain(x, times()), four, rtol=1e-4, atol=1e-5)


def test_half_precision_leaves_the_time_exact():
    network, x = tiny(), inputs()[0]
    embeddings = []
    network.embed.register_forward_hook(lambda _, __, out: embeddings.append(out))
    with torch.no_grad():
        expected = network(x, times())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(x, times())
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(network(x, times()), expected, rtol=1e-4, atol=1e-5)
    assert out.dtype == torch.bfloat16
    assert ((out - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(embeddings[0], embeddings[1])


def test_copies_are_independent_and_dropout_acts_in_training_only():
    network = tiny(dropout=0.3)
    twin, x = copy.deepcopy(network), inputs()[0]
    with torch.no_grad():
        before = network(x, times())
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(network(x, times()), before)
        network.train()
        assert not torch.equal(network(x, times()), network(x, times()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be an integer of at least 1, got 0"),
        ({"norm_groups": 16}, "model_channels must be a multiple of 16, got 8"),
        ({"downsample_padding": -1}, "downsample_padding must be an integer of at least 0, got -1"),
        ({"norm_eps": 1}, r"norm_eps must be in \[0, 1\), got 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attn_resolutions": (16,)}, r"attn_resolutions must be among the levels' resolutions \[8, 4\], got \(16,\)"),
        ({"resolution": 9}, "got 2 levels at resolution 9"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusersUNet(**{**TINY, **options})


def test_the_networks_are_there_without_waiting_for_diffusers():
    code = "import stillhouse.networks, sys; raise SystemExit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

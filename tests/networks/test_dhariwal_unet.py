import copy

import pytest
import torch
from network_tools import fill, inputs, noise, randomised

from stillhouse.networks import DhariwalUNet

TINY = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_classes": 10,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}


def tiny(seed: int = 0, **options) -> DhariwalUNet:
    """A small network none of whose layers is near zero, in evaluation mode."""
    torch.manual_seed(seed)
    return randomised(DhariwalUNet(**{**TINY, **options}))


def test_output_is_that_of_edms_own_network():
    """`expected`: 8 output pixels of NVlabs/edm's DhariwalUNet (commit 008a4e5) given the same weights and inputs."""
    options = {"num_classes": 4, "augment_dim": 9, "model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1}
    network = DhariwalUNet(16, 3, 3, **options, attn_resolutions=(16,)).eval()
    fill(network)
    with torch.no_grad():
        out = network(noise(1, 2, 3, 16, 16), torch.tensor([-1.0, 0.5]), torch.tensor([3, 1]), noise(2, 2, 9))
    pixels = out.flatten(1)[:, [0, 17, 391, 767]].flatten()
    torch.testing.assert_close(
        pixels,
        torch.tensor([-0.50916, -0.61337, -1.63373, 0.43777, -0.53393, 0.2814, -0.88605, 0.36495]),
        rtol=0,
        atol=3e-5,
    )


def test_parameter_count_of_the_published_network():
    with torch.device("meta"):
        network = DhariwalUNet(64, 3, 3, num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 295_899_267
    assert (network.encoder_channels, network.encoder_resolution) == (768, 8)


def test_state_dict_holds_the_parameters_only():
    network = tiny(augment_dim=9)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


def test_starts_as_zero_with_every_block_the_identity():
    torch.manual_seed(0)
    network = DhariwalUNet(**TINY).eval()
    x, noise_labels, labels = inputs()
    assert not network(x, noise_labels, labels).any()
    block = network.decoder["4"].entry[0]
    features = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(features, torch.randn(2, 64)), features)


def test_weights_depend_on_the_seed_alone():
    first, again, other = (DhariwalUNet(**TINY) for i in range(3) if torch.manual_seed(i // 2))
    pairs = list(
        zip(first.state_dict().values(), again.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_each_sample_is_on_its_own():
    network = tiny()
    x, noise_labels, labels = inputs()
    with torch.no_grad():
        out = network(x, noise_labels, labels)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(network(x[order], noise_labels[order], labels[order]), out[order])
        torch.testing.assert_close(network(x[2:3], noise_labels[2:3], labels[2:3]), out[2:3])
    assert out.std() > 0.1


def test_noise_class_and_augment_labels_matter_and_none_is_zero():
    network = tiny(augment_dim=9)
    x, noise_labels, labels = inputs()
    augment = torch.randn(6, 9)
    with torch.no_grad():
        out = network(x, noise_labels, labels, augment)
        for changed in (
            network(x, noise_labels + 1, labels, augment),
            network(x, noise_labels, (labels + 1) % 10, augment),
            network(x, noise_labels, labels, augment + 1),
        ):
            assert ((changed - out).abs().amax((1, 2, 3)) > 1e-3).all()
        assert torch.equal(network(x, noise_labels, labels, torch.zeros(6, 9)), network(x, noise_labels, labels))
        unlabelled = network(x, noise_labels)
        network.embed.label.weight.zero_()
        torch.testing.assert_close(network(x, noise_labels, labels), unlabelled)


def test_labels_are_hidden_in_training_only():
    network = tiny(label_dropout=0.5, dropout=0.0)
    x, noise_labels, _ = (t[:1].expand(400, *t.shape[1:]) for t in inputs())
    labels = torch.full((400,), 7)
    with torch.no_grad():
        labelled, unlabelled = network(x, noise_labels, labels), network(x, noise_labels)
        out = network.train()(x, noise_labels, labels)
    shown, hidden = ((out - y).abs().amax((1, 2, 3)) < 1e-4 for y in (labelled, unlabelled))
    assert (shown ^ hidden).all()
    assert 140 < hidden.sum() < 260  # six standard deviations


def test_dropout_acts_in_training_only():
    network = tiny(dropout=0.3)
    x, noise_labels, labels = inputs()
    with torch.no_grad():
        assert torch.equal(network(x, noise_labels, labels), network(x, noise_labels, labels))
        network.train()
        assert not torch.equal(network(x, noise_labels, labels), network(x, noise_labels, labels))


def test_encode_gives_what_the_decoder_gets():
    network = tiny(channel_mult=(1, 3))
    x, noise_labels, labels = inputs()
    entered = []
    network.decoder["4"].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        network(x, noise_labels, labels)
        features = network.encode(x, noise_labels, labels)
        assert not torch.equal(network.encode(x, noise_labels), features)
    assert torch.equal(features, entered[0])
    assert features.shape == (6, network.encoder_channels, network.encoder_resolution, network.encoder_resolution)
    assert (network.encoder_channels, network.encoder_resolution) == (48, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\)"):
        network.encode(x[:, :, :4], noise_labels)


@pytest.mark.parametrize("labelled", [True, False])
def test_every_parameter_has_a_gradient(labelled):
    network = tiny(augment_dim=9).train()
    x, noise_labels, labels = inputs()
    out = network(x, noise_labels, *((labels, torch.randn(6, 9)) if labelled else ()))
    out.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        unused = not labelled and name in ("embed.label.weight", "embed.augment.weight")
        assert bool(parameter.grad.any()) != unused, name


def test_channels_last_gives_the_same():
    network = tiny()
    x, noise_labels, labels = inputs()
    with torch.no_grad():
        expected = network(x, noise_labels, labels)
        network.to(memory_format=torch.channels_last)
        seen = []
        network.decoder["8"].register_forward_hook(lambda _, __, out: seen.append(out))
        out = network(x.to(memory_format=torch.channels_last), noise_labels, labels)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast_is_close():
    network = tiny()
    x, noise_labels, labels = inputs()
    embeddings = []
    network.embed.register_forward_hook(lambda _, __, out: embeddings.append(out))
    with torch.no_grad():
        expected = network(x, noise_labels, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(x, noise_labels, labels)
    assert out.dtype == torch.bfloat16
    assert ((out - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(*embeddings)  # the noise level is not rounded


def test_training_and_encoding_are_one_graph_each():
    torch._dynamo.reset()
    network = tiny(augment_dim=9, label_dropout=0.1).train()
    x, noise_labels, labels = inputs()
    report = torch._dynamo.explain(network)(x, noise_labels, labels, torch.randn(6, 9))
    assert (report.graph_count, report.graph_break_count) == (1, 0)
    encode = torch.compile(network.encode, fullgraph=True, backend="eager")
    encode(x, noise_labels, labels).square().sum().backward()
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {"embed", "stem", "encoder"}


def test_compiled_under_autocast_gives_the_same():
    torch._dynamo.reset()
    network = tiny()
    x, noise_labels, labels = inputs()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x, noise_labels, labels), network(x, noise_labels, labels))


def test_copies_are_independent():
    network = tiny()
    twin = copy.deepcopy(network)
    x, noise_labels, labels = inputs()
    with torch.no_grad():
        before = network(x, noise_labels, labels)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(network(x, noise_labels, labels), before)


def test_runs_in_double_precision():
    network = tiny().double()
    x, noise_labels, labels = inputs()
    out = network(x.double(), noise_labels.double(), labels)
    assert out.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(network.float()(x, noise_labels, labels), out.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be an integer of at least 1, got 0"),
        ({"model_channels": 32.0}, "model_channels must be an integer of at least 1, got 32.0"),
        ({"model_channels": 30}, "model_channels must be a multiple of 4, got 30"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"label_dropout": 0.1, "num_classes": 0}, "label_dropout=0.1 needs labels"),
        ({"channel_mult": 2}, "channel_mult must be a list of integers, got 2"),
        ({"channel_mult": (1,) * 5}, "got 5 levels at resolution 8"),
        ({"attn_resolutions": (16,)}, r"attn_resolutions must be among the levels' resolutions \[8, 4\], got \(16,\)"),
        ({"channels_per_head": 0}, "channels_per_head must be an integer of at least 1, got 0"),
        ({"channels_per_head": 64}, "channels_per_head=64 must divide the 32 channels at resolution 4, which has"),
        ({"channels_per_head": 32, "attn_resolutions": (8,)}, "must divide the 16 channels at resolution 8"),
        ({"channels_per_head": 24, "attn_resolutions": ()}, "must divide the 32 channels at resolution 4"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        DhariwalUNet(**{**TINY, **options})
    assert "\n" not in str(caught.value)


def test_wrong_inputs_are_named():
    x, noise_labels, labels = inputs(2)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        tiny()(x.expand(2, 3, 8, 8), noise_labels, labels)
    with pytest.raises(ValueError, match="unconditional network"):
        tiny(num_classes=0)(x, noise_labels, labels)
    with pytest.raises(ValueError, match=r"augment_labels must have shape \(2, 9\), got float32 of shape \(2, 8\)"):
        tiny(augment_dim=9)(x, noise_labels, labels, torch.zeros(2, 8))

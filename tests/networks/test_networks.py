"""What holds for every network: samples apart, labels, dropout, gradients, formats, precision, misuse."""

import copy

import pytest
import torch
from network_tools import NETWORKS, inputs, tiny

CONDITIONAL = [kind for kind in NETWORKS if kind != "ddpm"]
AUGMENTED = ["ddpmpp", "ncsnpp", "skip", "adm"]
each_network = pytest.mark.parametrize("kind", NETWORKS)


@each_network
@torch.no_grad()
def test_each_sample_is_on_its_own_and_labels_matter(kind):
    network = tiny(kind)
    given = inputs(network)
    out = network(*given)
    assert out.shape == given[0].shape
    assert out.std() > 0.1
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(network(*(value[order] for value in given)), out[order])
    torch.testing.assert_close(network(*(value[2:3] for value in given)), out[2:3])
    for i in range(len(given)):
        changed = [value if j != i else (value + 1) % 10 if j == 2 else value + 1 for j, value in enumerate(given)]
        assert ((network(*changed) - out).abs().amax((1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("kind", AUGMENTED)
@torch.no_grad()
def test_augmentation_matters_and_no_label_is_zero(kind):
    network = tiny(kind, augment_dim=9)
    given, augment = inputs(network), torch.randn(6, 9)
    out = network(*given, augment)
    assert ((network(*given, augment + 1) - out).abs().amax((1, 2, 3)) > 1e-3).all()
    assert torch.equal(network(*given, torch.zeros(6, 9)), network(*given))
    unlabelled = network(*given[:2])
    network.embed.label.weight.zero_()
    torch.testing.assert_close(network(*given), unlabelled)


@pytest.mark.parametrize("kind", ["ddpmpp", "adm", "edm2", "mlp"])
@torch.no_grad()
def test_labels_are_hidden_in_training_only(kind):
    network = tiny(kind, label_dropout=0.5)
    x, noise_labels, _ = (value[:1].expand(400, *value.shape[1:]) for value in inputs(network))
    labels = torch.full((400,), 7)
    labelled, unlabelled = network(x, noise_labels, labels), network(x, noise_labels)
    out = network.train()(x, noise_labels, labels)
    shown, hidden = ((out - y).abs().amax((1, 2, 3)) < 1e-4 for y in (labelled, unlabelled))
    assert (shown ^ hidden).all()
    assert 140 < hidden.sum() < 260  # six standard deviations


@each_network
@torch.no_grad()
def test_copies_are_independent_and_dropout_acts_in_training_only(kind):
    network = tiny(kind, dropout=0.3)
    given, twin = inputs(network), copy.deepcopy(network)
    before = network(*given)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(network(*given), before)
    network.train()
    assert not torch.equal(network(*given), network(*given))


def test_weights_depend_on_the_seed_alone_and_state_dicts_hold_no_other_buffers():
    for kind, (made, options) in NETWORKS.items():
        first, again, other = (made(**options).state_dict() for i in range(3) if torch.manual_seed(i // 2))
        assert all(torch.equal(first[name], again[name]) for name in first), kind
        assert any(not torch.equal(first[name], other[name]) for name in first), kind
        extra = first.keys() - {name for name, _ in made(**options).named_parameters()}
        drawn = {"ncsnpp": {"embed.noise.freqs"}, "edm2": {"embed.waves.freqs", "embed.waves.phases"}}
        assert extra == drawn.get(kind, set()), kind


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {"augment_dim": 9} if kind in AUGMENTED else {}) for kind in NETWORKS]
    + [("skip", {"encoder": "residual", "augment_dim": 9}), ("ncsnpp", {"encoder": "skip", "augment_dim": 9})],
)
def test_every_parameter_has_a_gradient(kind, options, labelled):
    """As DDP needs it: without labels too, where it is zero."""
    network = tiny(kind, **options).train()
    given = inputs(network) if labelled else inputs(network)[:2]
    augment = [torch.randn(6, 9)] if labelled and "augment_dim" in options else []
    network(*given, *augment).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        unused = not labelled and name in ("embed.label.weight", "embed.augment.weight")
        assert bool(parameter.grad.any()) != unused, name


@each_network
@torch.no_grad()
def test_formats_and_precisions(kind):
    """channels_last gives the same and stays; autocast is close and leaves the embedding exact; float64 works throughout."""
    network = tiny(kind)
    given = inputs(network)
    expected = network(*given)
    embeddings, features = [], []
    network.embed.register_forward_hook(lambda _, __, out: embeddings.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(*given)
    network(*given)
    assert out.dtype == torch.bfloat16
    assert ((out - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(embeddings[0], embeddings[1])  # the noise level is not rounded
    if kind in AUGMENTED:
        network.decoder["8"].register_forward_hook(lambda _, __, out: features.append(out))
    network.to(memory_format=torch.channels_last)
    out = network(given[0].to(memory_format=torch.channels_last), *given[1:])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in features)
    if kind != "ddpm":  # diffusers' layers have float32 in some places
        double = network.double()(given[0].double(), given[1].double(), *given[2:])
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [*AUGMENTED, "edm2", "ddpm"])
@torch.no_grad()
def test_encode_gives_what_the_decoder_gets(kind):
    network = tiny(kind, channel_mult=(1, 3))
    given, entered = inputs(network), []
    middle = network.mid_block if kind == "ddpm" else network.decoder["4"]
    middle.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    network(*given)
    features = network.encode(*given)
    assert torch.equal(features, entered[0])
    assert features.shape == (6, network.encoder_channels, network.encoder_resolution, network.encoder_resolution)
    assert (network.encoder_channels, network.encoder_resolution) == (24 if kind == "ddpm" else 48, 4)
    assert network.num_classes == 0 or not torch.equal(network.encode(*given[:2]), features)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\)"):
        network.encode(given[0][:, :, :4], given[1])


@pytest.mark.parametrize("kind", ["ncsnpp", "adm", "edm2"])
def test_encoding_trains_the_encoder_alone(kind):
    network = tiny(kind)
    network.encode(*inputs(network)).square().sum().backward()
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {"embed", "stem", "encoder"}


MISUSE = [
    ("ddpmpp", {"embedding": "sinus"}, "embedding must be one of positional, fourier, got 'sinus'"),
    ("ddpmpp", {"encoder": "resid"}, "encoder must be one of standard, residual, skip, got 'resid'"),
    ("ddpmpp", {"decoder": "residual"}, "decoder must be one of standard, skip, got 'residual'"),
    (
        "ddpmpp",
        {"resample_filter": (1, 2, 1)},
        r"resample_filter must be one of \(1, 1\), \(1, 3, 3, 1\), got \(1, 2, 1\)",
    ),
    ("ddpmpp", {"dropout": "0.1"}, r"dropout must be in \[0, 1\), got '0.1'"),
    ("ddpmpp", {"label_dropout": float("nan")}, r"label_dropout must be in \[0, 1\), got nan"),
    ("ddpmpp", {"channel_mult": (1, 0)}, r"channel_mult\[1\] must be an integer of at least 1, got 0"),
    ("ddpmpp", {"channel_mult": ()}, "got 0 levels at resolution 8"),
    ("adm", {"channels_per_head": 0}, "channels_per_head must be an integer of at least 1, got 0"),
    ("adm", {"channels_per_head": 64}, "channels_per_head=64 must divide the 32 channels at resolution 4, which has"),
    ("adm", {"channels_per_head": 32, "attn_resolutions": (8,)}, "must divide the 16 channels at resolution 8"),
    ("adm", {"channels_per_head": 24, "attn_resolutions": ()}, "must divide the 32 channels at resolution 4"),
    ("ddpm", {"norm_groups": 16}, "model_channels must be a multiple of 16, got 8"),
    ("ddpm", {"downsample_padding": -1}, "downsample_padding must be an integer of at least 0, got -1"),
    ("ddpm", {"norm_eps": 1}, r"norm_eps must be in \[0, 1\), got 1"),
    ("mlp", {"resolution": 2}, "an MLP reads images of one pixel: resolution must be 1, got 2; take a U-Net"),
    ("mlp", {"width": 18}, "width must be a multiple of 4, got 18"),
    ("mlp", {"embedding": "rotary"}, "embedding must be one of positional, fourier, got 'rotary'"),
]
for kind in NETWORKS:
    MISUSE += [
        (kind, {"num_blocks": 0}, "num_blocks must be an integer of at least 1, got 0"),
        (kind, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ]
for kind in CONDITIONAL:
    MISUSE += [
        (kind, {"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        (kind, {"num_classes": 0, "label_dropout": 0.1}, "label_dropout=0.1 needs labels"),
    ]
for kind in ("ddpmpp", "adm"):
    MISUSE += [
        (kind, {"model_channels": 32.0}, "model_channels must be an integer of at least 1, got 32.0"),
        (kind, {"model_channels": 30}, "model_channels must be a multiple of 4, got 30"),
        (kind, {"channel_mult": 2}, "channel_mult must be a list of integers, got 2"),
        (kind, {"channel_mult": (1,) * 5}, "got 5 levels at resolution 8"),
    ]
for kind in ("ddpmpp", "adm", "ddpm"):
    MISUSE += [
        (kind, {"resolution": 9}, "got 2 levels at resolution 9"),
        (
            kind,
            {"attn_resolutions": (16,)},
            r"attn_resolutions must be among the levels' resolutions \[8, 4\], got \(16,\)",
        ),
    ]


@pytest.mark.parametrize(("kind", "options", "message"), MISUSE)
def test_wrong_options_are_named(kind, options, message):
    made, defaults = NETWORKS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        made(**(defaults | options))
    assert "\n" not in str(caught.value)


@each_network
def test_wrong_inputs_are_named(kind):
    network = tiny(kind)
    x, c, *labels = inputs(network, 2)
    shape = r"\(B, {}, {}, {}\)".format(*x.shape[1:])
    wrong = [
        ([x.repeat(1, 3, 1, 1), c], rf"x must have shape {shape}, got \(2, {3 * x.shape[1]}, "),
        ([x, c[:, None]], r"noise_labels must be floats of shape \(2,\), got float32 of"),
        ([x, c.long()], r"noise_labels must be floats of shape \(2,\), got int64"),
        ([x, c, None, torch.zeros(2, 9)], r"augment_labels were given .*augment_dim=0\); pass None"),
    ]
    if labels:
        wrong += [([x, c, torch.zeros(2)], r"class_labels must be int64 of shape \(2,\)")]
        wrong += [([x, c, labels[0][:1]], r"class_labels must be int64 of shape")]
        with pytest.raises(RuntimeError, match="smaller than num_classes"):
            network(x, c, labels[0] + 10)
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            network(*given)
    plain = tiny(kind, num_classes=0) if labels else network
    with pytest.raises(ValueError, match="class_labels were given to an unconditional network"):
        plain(x, c, torch.zeros(2, dtype=torch.int64))
    if kind in AUGMENTED:
        with pytest.raises(ValueError, match=r"augment_labels must have shape \(2, 9\), got float32 of shape \(2, 8\)"):
            tiny(kind, augment_dim=9)(x, c, *labels, torch.zeros(2, 8))

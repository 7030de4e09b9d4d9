import pytest
import torch
from network_tools import randomised

from stillhouse.diffusion import preconditioning as P
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.networks import (
    MLP,
    Discriminator,
    branches_of,
    collapse,
    condition_on_steps,
    fixed_steps_state,
    reading_all,
    set_steps,
    widen,
)

B = 7


def network(seed=0, **options) -> MLP:
    """None of whose layers is near zero, in evaluation mode."""
    torch.manual_seed(seed)
    return randomised(MLP(1, 2, 2, **{"width": 16, "num_blocks": 2, **options}))


def points(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 2, 1, 1, generator=generator), torch.randn(B, generator=generator)


def test_contract():
    net = MLP(1, 2, 3, num_classes=4)
    assert (net.resolution, net.in_channels, net.out_channels, net.num_classes) == (1, 2, 3, 4)
    x, c = points()
    assert net(x, c, torch.arange(B) % 4).shape == (B, 3, 1, 1)
    assert net(x, c).abs().max() == 0, "the output starts at zero"
    assert 150_000 < sum(p.numel() for p in MLP(1, 2, 2).parameters()) < 300_000


def test_samples_do_not_see_each_other_but_their_own_level_and_class():
    net, (x, c) = network(num_classes=4), points()
    labels = torch.arange(B) % 4
    whole = net(x, c, labels)
    torch.testing.assert_close(torch.cat([net(x[i : i + 1], c[i : i + 1], labels[i : i + 1]) for i in range(B)]), whole)
    for changed in (net(x + 0.1, c, labels), net(x, c + 0.1, labels), net(x, c, (labels + 1) % 4), net(x, c)):
        assert ((changed - whole).abs().flatten(1).amax(1) > 1e-4).all()


@pytest.mark.parametrize("preconditioning", [P.EDM(), P.Velocity(), P.V(), P.X0()], ids=lambda p: type(p).__name__)
def test_every_preconditionings_noise_input_tells_levels_apart(preconditioning):
    """Learns to say which level it sees, from the noise input alone."""
    torch.manual_seed(0)
    net = MLP(1, 2, 2, width=64, num_blocks=2)
    sigma = torch.logspace(-2, 1.5, 64, dtype=torch.float64)
    target = sigma.log()[:, None].float()
    c_noise = preconditioning(sigma).noise.float()
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(300):
        loss = (net(torch.zeros(64, 2, 1, 1), c_noise).flatten(1) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.02 * target.var()
    assert Denoiser(net, preconditioning)(torch.randn(64, 2, 1, 1), sigma.float()).isfinite().all()


def test_every_parameter_has_a_gradient_even_without_labels():
    net, (x, c) = network(num_classes=4), points()
    net(x, c).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_branches_begin_alike_and_the_last_is_the_plain_network():
    net, (x, c) = network(), points()
    plain = net(x, c)
    widen(net, 3)
    assert torch.equal(net(x, c), plain)
    with reading_all(net):
        torch.testing.assert_close(net(x, c), plain.repeat(1, 3, 1, 1))
    assert branches_of(net) == 3
    collapse(net)
    assert torch.equal(net(x, c), plain)


def test_the_number_of_steps_can_be_told_and_fixed():
    net, (x, c) = network(), points()
    plain = net(x, c)
    condition_on_steps(net, 2)
    assert torch.equal(net(x, c), plain)
    torch.nn.init.normal_(net.embed.steps.layer2.weight)
    set_steps(net, 4)
    fixed = network()
    fixed.load_state_dict(fixed_steps_state(net, 4))
    assert (net(x, c) - plain).abs().max() > 1e-3
    torch.testing.assert_close(fixed(x, c), net(x, c))


def test_a_discriminator_reads_its_features():
    net, (x, c) = network(), points()
    features = net.encode(x, c)
    assert features.shape == (B, net.encoder_channels, 1, 1)
    assert Discriminator(net)(features).shape == (B, 1)
    assert torch.equal(net.head(features), net(x, c))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 2}, "an MLP reads images of one pixel: resolution must be 1, got 2; take a U-Net"),
        ({"width": 18}, "width must be a multiple of 4, got 18"),
        ({"num_blocks": 0}, "num_blocks must be an integer of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"label_dropout": 0.1}, "label_dropout=0.1 needs labels"),
        ({"embedding": "rotary"}, "embedding must be one of positional, fourier, got 'rotary'"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        MLP(**{"resolution": 1, "in_channels": 2, "out_channels": 2, **options})


def test_other_inputs_are_refused():
    net, (x, c) = network(), points()
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2, 1, 1\), got \(7, 3, 1, 1\)"):
        net(torch.zeros(B, 3, 1, 1), c)
    with pytest.raises(ValueError, match="class_labels were given to an unconditional network"):
        net(x, c, torch.zeros(B, dtype=torch.int64))
    with pytest.raises(ValueError, match="augment_labels were given to a network without them"):
        net(x, c, None, torch.zeros(B, 9))

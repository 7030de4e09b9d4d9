"""Networks of two times: they begin as the network of one, and every part that reads them knows which they are."""

import copy

import pytest
import torch
from network_tools import inputs, tiny

from closed_forms import ExactNetwork, Mixture
from stillhouse.checkpoints.weights import hash_form
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.flow import level_of, velocity
from stillhouse.diffusion.preconditioning import EDM, Velocity
from stillhouse.networks import condition_on_second_time

KINDS = ("ddpmpp", "ncsnpp", "adm", "ddpm", "mlp")


def two_times(kind="mlp", trained=False):
    network = tiny(kind)
    condition_on_second_time(network)
    if trained:
        torch.manual_seed(0)
        torch.nn.init.normal_(network.embed.second_time.layer2.weight)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_network_of_one_time_bit_for_bit(kind):
    """At any span; trained it knows the span, and all of its parameters learn."""
    plain, network = tiny(kind), two_times(kind)
    given, span = inputs(plain), torch.linspace(0, 1, 6)
    assert network.two_times
    assert not plain.two_times
    for each in (span, 0 * span):
        assert torch.equal(network(*given, span=each), plain(*given))
    torch.nn.init.normal_(network.embed.second_time.layer2.weight)
    difference = (network(*given, span=span) - network(*given, span=0 * span)).flatten(1).abs().amax(1)
    assert difference[0] == 0
    assert (difference[1:] > 1e-4).all()
    network(*given, span=span).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_its_weights_are_those_of_one_time_and_its_own():
    plain, network = tiny("ddpmpp"), two_times("ddpmpp", trained=True)
    own = {f"embed.second_time.layer{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    assert set(network.state_dict()) == set(plain.state_dict()) | own
    twin = two_times("ddpmpp")
    twin.load_state_dict(network.state_dict())
    given, span = inputs(plain), torch.rand(6)
    for other in (twin, copy.deepcopy(network)):
        assert torch.equal(other(*given, span=span), network(*given, span=span))
    assert hash_form(plain) != hash_form(network)


def test_a_denoiser_reads_the_span_in_flow_time():
    """Without a second level its estimate is of the whole way, and a flow's velocity of none."""
    network = two_times(trained=True)
    x, _, labels = inputs(network)
    sigma, until = torch.full((6,), 3.0), torch.full((6,), 1.0)
    denoiser, seen = Denoiser(network, EDM()), []
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["span"]), with_kwargs=True)
    ends = [denoiser(x, sigma, labels, until=until), denoiser(x, sigma[0], labels, until=until[0])]
    assert torch.equal(*ends)
    assert torch.equal(denoiser(x, sigma, labels), denoiser(x, sigma, labels, until=0 * until))
    t = torch.full((6,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(level_of(t), sigma.double())
    z = x.double() * t.view(-1, 1, 1, 1)
    for second in (None, 2 * t):
        velocity(denoiser, z, t, labels, until=second)
    for found, expected in zip(seen, (0.25, 0.25, 0.75, 0.75, 0.0, 0.25), strict=True):
        torch.testing.assert_close(found, torch.full((6,), expected))
    u = velocity(denoiser, z, t, labels, until=2 * t)
    torch.testing.assert_close(ends[0].double(), z + 0.75 * u, rtol=1e-5, atol=1e-5)


def test_misuse():
    network, plain = two_times(), tiny("mlp")
    given, span = inputs(plain), torch.zeros(6)
    with pytest.raises(ValueError, match="knows a second time already"):
        condition_on_second_time(network)
    with pytest.raises(ValueError, match="ExactNetwork has no embedding of the noise level that a second time could"):
        condition_on_second_time(ExactNetwork("edm", Mixture()))
    with pytest.raises(ValueError, match="this MLP has one time and takes no span"):
        plain(*given, span=span)
    with pytest.raises(ValueError, match="this MLP needs a span to its second time"):
        network(*given)
    with pytest.raises(ValueError, match=r"span must be floats of shape \(6,\), got float32 of shape \(1,\)"):
        network(*given, span=span[:1])
    with pytest.raises(ValueError, match="this network has one time, and no answer to `until`"):
        Denoiser(plain, Velocity())(given[0], given[1].exp(), until=span)

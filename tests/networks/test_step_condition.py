import copy

import pytest
import torch
from network_tools import inputs
from network_tools import tiny as plain_network

from closed_forms import ExactNetwork, Mixture
from stillhouse.networks import (
    branches_of,
    condition_on_steps,
    fixed_steps_state,
    reading_all,
    set_steps,
    widen,
)

KINDS = ("ddpmpp", "ncsnpp", "adm", "ddpm", "mlp")
each_network = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str = "ddpmpp", steps: int | None = None):
    network = plain_network(kind)
    if steps is not None:
        condition_on_steps(network, steps)
    return network


def trained(kind: str, branches: int = 1):
    """A conditioned network after steps of Adam at two numbers of steps with different targets."""
    network = tiny(kind, 2)
    widen(network, branches)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for count, target in ((2, 1.0), (5, -1.0), (2, 1.0)):
        optimizer.zero_grad()
        set_steps(network, count)
        with reading_all(network):
            (network(*inputs(network)) - target).square().mean().backward()
        optimizer.step()
    return network


def evaluated(network):
    with torch.no_grad():
        return network(*inputs(network))


@each_network
def test_starts_as_the_plain_network_bit_for_bit_at_any_number_of_steps(kind):
    network = tiny(kind, 4)
    expected = evaluated(tiny(kind))
    for count in (1, 4, 1000):
        assert torch.equal(evaluated(network), expected)
        set_steps(network, count)


@each_network
def test_trained_it_knows_its_number_of_steps(kind):
    network = trained(kind)
    outputs = []
    for count in (2, 5, 2):
        set_steps(network, count)
        outputs.append(evaluated(network))
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@each_network
@pytest.mark.parametrize("branches", [1, 3])
def test_at_a_fixed_number_of_steps_it_is_a_plain_network(kind, branches):
    network = trained(kind, branches)
    set_steps(network, 2)
    out = evaluated(network)
    fixed = {count: fixed_steps_state(network, count) for count in (2, 5)}
    assert torch.equal(evaluated(network), out)  # the number it is set to stays
    for count, state in fixed.items():
        plain = tiny(kind)
        plain.load_state_dict(state)
        set_steps(network, count)
        torch.testing.assert_close(evaluated(plain), evaluated(network), rtol=1e-4, atol=1e-5)
        stem = "conv_in.weight" if kind == "ddpm" else "stem.weight"
        assert state[stem].data_ptr() == network.get_parameter(stem).data_ptr()
    assert not torch.equal(fixed[2]["embed.layer2.bias"], fixed[5]["embed.layer2.bias"])
    assert (branches_of(network), network.embed.steps.count.item()) == (branches, 5)


@each_network
def test_every_parameter_has_a_gradient(kind):
    network = tiny(kind, 4)
    network(*inputs(network)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # as DDP needs it
    assert network.embed.steps.layer2.weight.grad.any()


def test_names_appear_where_it_is_conditioned_and_the_number_itself_is_no_weight():
    plain, conditioned = tiny().state_dict(), tiny(steps=4).state_dict()
    added = {f"embed.steps.layer{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert conditioned.keys() - plain.keys() == added
    assert plain.keys() <= conditioned.keys()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"embed.steps"):
        tiny().load_state_dict(conditioned)


def test_a_copy_has_a_number_of_its_own():
    network = trained("ddpmpp")
    twin = copy.deepcopy(network)
    out = evaluated(network)
    set_steps(twin, 5)
    assert torch.equal(evaluated(network), out)
    assert not torch.equal(evaluated(twin), out)


def test_follows_the_networks_precision_and_ignores_autocast():
    network = tiny().double()
    condition_on_steps(network, 4)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    network = trained("ddpmpp")
    embeddings = []
    network.embed.register_forward_hook(lambda _, __, out: embeddings.append(out))
    evaluated(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluated(network)
    assert torch.equal(*embeddings)


def test_odd_requests_are_refused():
    network = tiny()
    for count in (0, -1, 4.0):
        for request in (condition_on_steps, set_steps, fixed_steps_state):
            with pytest.raises(ValueError, match=f"count must be an integer of at least 1, got {count!r}"):
                request(network, count)
    for request in (set_steps, fixed_steps_state):
        for unaware in (network, ExactNetwork("edm", Mixture())):
            with pytest.raises(ValueError, match=r"does not know its number of steps: condition_on_steps\(network, "):
                request(unaware, 4)
    condition_on_steps(network, 4)
    with pytest.raises(ValueError, match="knows its number of steps already; set_steps changes it"):
        condition_on_steps(network, 4)
    with pytest.raises(ValueError, match="ExactNetwork has no embedding of the noise level"):
        condition_on_steps(ExactNetwork("edm", Mixture()), 4)
    with pytest.raises(ValueError, match="EDM2UNet has no bias in its embedding .* train it for one number"):
        condition_on_steps(tiny("edm2"), 4)

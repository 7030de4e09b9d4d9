import copy

import pytest
import torch
from network_tools import inputs
from network_tools import tiny as plain_network

from closed_forms import ExactNetwork, Mixture
from stillhouse.checkpoints import load_weights, save_weights
from stillhouse.networks import (
    BranchedConv2d,
    SongUNet,
    branches_of,
    collapse,
    plain_state,
    reading_all,
    respread,
    widen,
)

CHANNELS = 2
KINDS = ("ddpmpp", "skip", "adm", "ddpm", "mlp")
each_network = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str = "ddpmpp", branches: int = 1, seed: int = 0):
    network = plain_network(kind, seed, in_channels=CHANNELS, out_channels=CHANNELS)
    widen(network, branches)
    return network


def evaluated(network):
    with torch.no_grad():
        return network(*inputs(network))


def groups_of(network):
    """(B, K, C, H, W), with gradient."""
    with reading_all(network):
        return network(*inputs(network)).unflatten(1, (-1, CHANNELS))


def step(network):
    """One step of Adam, after which all groups differ."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    targets = torch.randn(groups_of(network).shape, generator=torch.Generator().manual_seed(5))
    (groups_of(network) - targets).square().sum().backward()
    optimizer.step()
    return optimizer


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@each_network
def test_every_group_starts_as_the_plain_network(kind):
    plain, branched = tiny(kind), tiny(kind, 3)
    expected = evaluated(plain)
    assert expected.std() > 0.1
    with torch.no_grad():
        groups = groups_of(branched)
    assert groups.shape == (6, 3, *expected.shape[1:])
    torch.testing.assert_close(groups, expected[:, None].expand_as(groups), rtol=1e-5, atol=1e-6)
    assert (branches_of(plain), branches_of(branched)) == (1, 3)


@each_network
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_end_point_is_the_collapsed_network_bit_for_bit(kind, memory_format):
    network = tiny(kind, 3)
    step(network)
    network.to(memory_format=memory_format)
    expected = evaluated(network)
    with torch.no_grad():
        torch.testing.assert_close(groups_of(network)[:, -1], expected, rtol=1e-5, atol=1e-6)
    plain, twin = tiny(kind, seed=1).to(memory_format=memory_format), copy.deepcopy(network)
    plain.load_state_dict(plain_state(network))
    assert torch.equal(evaluated(plain), expected)
    assert torch.equal(evaluated(twin), expected)
    collapse(twin)
    assert torch.equal(evaluated(twin), expected)
    assert_same_state(twin.state_dict(), plain.state_dict())
    assert (branches_of(twin), branches_of(network)) == (1, 3)


@each_network
def test_collapsed_and_widened_again_all_groups_are_the_old_end_point(kind):
    network = tiny(kind, 3)
    step(network)
    with torch.no_grad():
        before = groups_of(network)
    assert ((before - before[:, -1:]).abs().amax((0, 2, 3, 4))[:2] > 1e-3).all()
    end_point = evaluated(network)
    collapse(network)
    widen(network, 2)
    with torch.no_grad():
        after = groups_of(network)
    torch.testing.assert_close(after, end_point[:, None].expand_as(after), rtol=1e-5, atol=1e-6)


@each_network
def test_respread_does_the_same_and_keeps_the_parameters(kind):
    network = tiny(kind, 3)
    optimizer = step(network)
    end_point, parameters = evaluated(network), list(network.parameters())
    again = copy.deepcopy(network)
    collapse(again)
    widen(again, 3)
    respread(network)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert_same_state(network.state_dict(), again.state_dict())
    assert torch.equal(evaluated(network), end_point)
    optimizer.step()
    assert not torch.equal(evaluated(network), end_point)


def test_respread_reaches_the_weights_that_an_average_has_put_in_place():
    network = tiny(branches=2)
    step(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    respread(network)
    with torch.no_grad():
        groups = groups_of(network)
    torch.testing.assert_close(groups[:, 0], groups[:, 1])


@each_network
def test_one_branch_changes_nothing(kind):
    network = tiny(kind)
    parameters, state, out = list(network.parameters()), copy.deepcopy(network.state_dict()), evaluated(network)
    for change in (lambda n: widen(n, 1), collapse, respread):
        change(network)
        assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
        assert_same_state(network.state_dict(), state)
        assert torch.equal(evaluated(network), out)
        with torch.no_grad():
            assert torch.equal(groups_of(network)[:, 0], out)
    assert_same_state(plain_state(network), state)


@each_network
def test_each_groups_gradient_is_that_of_its_own_loss(kind):
    network = tiny(kind, 3)
    convs = [module for module in network.modules() if isinstance(module, BranchedConv2d)]
    assert len(convs) == (2 if kind == "skip" else 1)
    for k in range(3):
        network.zero_grad()
        groups_of(network)[:, k].square().sum().backward()
        for conv in convs:
            touched = conv.weight.grad.unflatten(0, (3, CHANNELS)).flatten(1).any(1)
            assert touched.tolist() == [k == group for group in range(3)]
        assert all(parameter.grad is not None for parameter in network.parameters())  # as DDP needs it
    network.zero_grad()
    network(*inputs(network)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    for conv in convs:
        assert conv.bias.grad.unflatten(0, (3, CHANNELS)).any(1).tolist() == [False, False, True]


@pytest.mark.parametrize(("branches", "added"), [(2, 6_915), (4, 20_745)])
def test_what_is_added_at_edms_cifar10_network(branches, added):
    with torch.device("meta"):
        network = SongUNet(32, 3, 3)
    before = sum(p.numel() for p in network.parameters())
    widen(network, branches)
    assert sum(p.numel() for p in network.parameters()) - before == added  # (3 * 3 * 256 + 1) * 3 for each more
    assert added / before < 4e-4
    assert f"branches={branches}" in repr(network.heads["32"])


def test_widening_keeps_precision_memory_format_and_what_is_frozen():
    network = tiny().double().to(memory_format=torch.channels_last).requires_grad_(False)
    widen(network, 2)
    conv = network.heads["8"].conv
    assert conv.weight.dtype == conv.bias.dtype == torch.float64
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_all_groups_are_read_within_the_block_only():
    network, other = tiny(branches=3), tiny(branches=3)
    with reading_all(network):
        with reading_all(network):
            assert evaluated(network).shape[1] == 3 * CHANNELS
        assert evaluated(network).shape[1] == 3 * CHANNELS
        assert evaluated(other).shape[1] == CHANNELS
    with pytest.raises(ZeroDivisionError), reading_all(network):
        _ = 1 / 0
    assert evaluated(network).shape[1] == CHANNELS


def test_plain_state_shares_memory():
    network = tiny(branches=3)
    state = plain_state(network)
    assert state["stem.weight"].data_ptr() == network.stem.weight.data_ptr()
    assert state["heads.8.conv.bias"].data_ptr() == network.heads["8"].conv.bias[-CHANNELS:].data_ptr()


@each_network
@pytest.mark.parametrize(("theirs", "ours"), [(3, 2), (3, 1), (1, 2)])
def test_a_state_dict_with_another_number_of_branches_is_refused_in_one_line(kind, theirs, ours):
    network, state = tiny(kind, ours), tiny(kind, theirs, seed=1).state_dict()
    out = evaluated(network)
    message = (
        f"these weights have branches={theirs}, this network branches={ours}: load them into a network with as many"
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        network.load_state_dict(state)
    assert str(caught.value).count("\n") == 1  # torch's own heading, and ours
    assert branches_of(network) == ours
    assert evaluated(network).shape == out.shape
    widened = tiny(kind, theirs)
    widened.load_state_dict(state)
    assert_same_state(widened.state_dict(), state)


def test_other_misfits_are_reported_as_torch_does():
    state = tiny(branches=2).state_dict()
    for name, message in (("heads.8.conv.weight", "size mismatch for heads.8.conv.weight"), ("stem.bias", "stem.bias")):
        with pytest.raises(RuntimeError, match=message):
            tiny(branches=2).load_state_dict({**state, name: state[name][:-1]})
    del state["heads.8.conv.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "heads.8.conv.weight"'):
        tiny(branches=2).load_state_dict(state)


def test_on_disk_a_branched_network_is_plain_and_a_branched_file_is_refused(tmp_path):
    network = tiny(branches=2)
    step(network)
    save_weights(tmp_path / "plain.safetensors", plain_state(network), {})
    plain = tiny(seed=1)
    load_weights(tmp_path / "plain.safetensors", plain)
    assert torch.equal(evaluated(plain), evaluated(network))
    save_weights(tmp_path / "branched.safetensors", network.state_dict(), {})
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(tmp_path / "branched.safetensors", plain)
    assert "SongUNet: of another shape: heads.8.conv.bias (4,) instead of (2,), heads.8.conv.weight" in str(
        caught.value
    )


def test_odd_requests_are_refused():
    network = tiny()
    for branches in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"branches must be an integer of at least 1, got {branches!r}"):
            widen(network, branches)
    widen(network, 3)
    for branches in (1, 3, 4):
        with pytest.raises(ValueError, match=f"branches={branches}: the network has 3 already; collapse it first"):
            widen(network, branches)
    exact = ExactNetwork("edm", Mixture())
    widen(exact, 1)
    assert branches_of(exact) == 1
    with pytest.raises(ValueError, match="branches=2: the output of ExactNetwork is no BranchedConv2d"):
        widen(exact, 2)

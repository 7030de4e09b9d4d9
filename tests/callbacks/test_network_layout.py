"""Compiled, or with channels innermost: the same run but for rounding, and the same files and names."""

import pytest
import torch
from method_runs import train
from process_tools import in_two_processes

from callbacks.network_layout import align_optimizer_state, all_denoisers
from stillhouse.networks.compiling import compile_network, eager

POINTS = "eight_gaussians"  # whose networks compile in seconds


def assert_alike(ours, theirs):
    assert ours.method.state_dict().keys() == theirs.method.state_dict().keys()
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        size = max(float(g.abs().max()) for g in b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-4 * size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["disback", "bezier"])
def test_channels_last_is_the_same_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, other = train(name), train(name, {"trainer.channels_last": True})
    assert_alike(other, plain)
    weights = [p for step in other.gradients for p in step if p.ndim == 4 and min(p.shape[1:3]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert all(
        p.is_contiguous() for denoiser in all_denoisers(other.method) for p in denoiser.parameters()
    )  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("name", ["denoising_student", "disback"])
def test_compiled_is_the_same_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"trainer.compile": "aot_eager", "trainer.micro_batch": 3}
    plain, other = train(name, data=POINTS), train(name, changes, data=POINTS)
    assert_alike(other, plain)
    for denoiser in all_denoisers(other.method):
        assert denoiser.network._compiled_call_impl is None  # what follows training measures as it always does


@pytest.mark.slow
def test_inductor_compiles_a_training_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_alike(train("flow_distill", {"trainer.compile": True}, data=POINTS), train("flow_distill", data=POINTS))


def test_samples_are_drawn_uncompiled():
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    network = torch.nn.Conv2d(1, 1, 1)
    network.compile(backend=backend)
    with eager(network):
        network(torch.zeros(1, 1, 4, 4))
    assert not calls
    network(torch.zeros(1, 1, 4, 4))
    assert len(calls) == 1
    compile_network(network, "eager")
    assert network.state_dict().keys() == {"weight", "bias"}


def test_moments_of_another_layout_are_laid_out_as_their_weights():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    expected = optimizer.state[weight]["exp_avg"].clone()
    weight.data = weight.data.to(memory_format=torch.channels_last)
    align_optimizer_state(optimizer)
    moment = optimizer.state[weight]["exp_avg"]
    assert moment.stride() == weight.stride()
    assert torch.equal(moment, expected)


def _two(rank, folder):
    import os

    os.chdir(folder)
    two = {"trainer.devices": 2, "batch_size": 8}
    changed = {"trainer.compile": "aot_eager", "trainer.channels_last": True, "trainer.micro_batch": 2}
    assert_alike(train("diff_instruct", two | changed, data=POINTS), train("diff_instruct", two, data=POINTS))


@pytest.mark.slow
def test_two_processes_compile_too(tmp_path):
    in_two_processes(_two, tmp_path)

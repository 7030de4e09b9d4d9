"""Under torch.compile each network is one graph for every kind of pass, and nothing that training does needs another."""

import copy

import pytest
import torch
import torch._dynamo.utils  # not loaded with torch
from compiler_tools import compiled_graphs, counted_compilation
from network_tools import NETWORKS, inputs, tiny
from vgg_file import write_vgg16

from stillhouse.checkpoints.lpips import load_lpips
from stillhouse.networks import Discriminator, condition_on_steps, reading_all, set_steps, widen
from stillhouse.networks.compiling import (
    MODES,
    check_compile,
    compile_network,
    eager,
    undo_compilation,
    uses_cuda_graphs,
)

__all__ = ["counted_compilation"]
AUGMENTED = ("ddpmpp", "ncsnpp", "skip", "adm")


def complete(kind):
    """A network with all that can be: labels and augmentation labels, dropout, branches, the number of steps."""
    options = {"dropout": 0.2} | ({} if kind == "ddpm" else {"label_dropout": 0.2})
    network = tiny(kind, **options, **({"augment_dim": 9} if kind in AUGMENTED else {}))
    if kind != "edm2":  # which takes neither
        condition_on_steps(network, 4)
        widen(network, 2)
    return network


def passes(kind):
    """Kinds of passes, by name: functions from a network, in training mode, to its output."""
    augment = [torch.linspace(-1, 1, 54).view(6, 9)] if kind in AUGMENTED else []

    def training(network):
        return network(*inputs(network), *augment)

    def autocast(network):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return training(network)

    def evaluation(network):
        network.eval()
        try:
            return training(network)
        finally:
            network.train()

    def frozen(network):
        network.requires_grad_(False)
        try:
            return training(network)
        finally:
            network.requires_grad_(True)

    def branches(network):
        with reading_all(network):
            return training(network)

    def encoder(network):
        return network.encode(*inputs(network))

    kinds = [training, torch.no_grad()(training), autocast, evaluation, frozen, encoder]
    if kind != "edm2":
        kinds.insert(2, branches)
    if NETWORKS[kind][1].get("num_classes"):
        kinds.append(lambda network: network(*inputs(network)[:2], None, *augment))
    if augment:
        kinds.append(lambda network: network(*inputs(network)))
    return kinds


@pytest.mark.usefixtures("counted_compilation")
@pytest.mark.parametrize(
    ("kind", "several"), [("mlp", 3), *(pytest.param(kind, None, marks=pytest.mark.slow) for kind in NETWORKS)]
)
def test_each_kind_of_pass_is_one_graph_whatever_happens_between(kind, several):
    network, kinds = complete(kind).train(), passes(kind)[:several]
    compile_network(network, "eager")
    for made, evaluate in enumerate(kinds, 1):
        same(network, evaluate)
        assert compiled_graphs() == made
    twin = copy.deepcopy(network)
    compile_network(twin, "eager")
    for steps, evaluate in enumerate(reversed(kinds), 1):
        if kind != "edm2":
            set_steps(network, steps)
        for parameter in network.parameters():  # as an average takes the weights' place, and as a checkpoint is loaded
            parameter.data = parameter.data * 0.9
        network.load_state_dict(network.state_dict())
        same(network, evaluate)
        same(twin, evaluate)
    assert compiled_graphs() == len(kinds)


def same(network, evaluate):
    """The compiled network gives what the plain one does, in every bit, with the same gradients."""
    outputs = []
    for plain in (False, True):
        torch.manual_seed(0)
        with eager(network) if plain else torch.autocast("cpu", enabled=False):
            out = evaluate(network)
        gradients = []
        if out.requires_grad:
            out.float().square().mean().backward()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
        network.zero_grad()
        outputs.append([out, *gradients])
    assert len(outputs[0]) == len(outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.usefixtures("counted_compilation")
def test_sizes_have_graphs_of_their_own_and_copies_are_plain():
    network = tiny("mlp")
    compile_network(network, "eager")
    for batch in (3, 2, 3, 2, 3):
        network(*inputs(network, batch))
    assert compiled_graphs() == 2
    with eager(network):
        network(*inputs(network, 5))
    copy.deepcopy(network)(*inputs(network, 5))
    undo_compilation(network)
    network(*inputs(network, 5))
    assert compiled_graphs() == 2


@pytest.mark.slow
@pytest.mark.usefixtures("counted_compilation")
def test_what_judges_images_is_one_graph_for_each_kind_of_pass(tmp_path):
    lpips = load_lpips(write_vgg16(tmp_path / "vgg16.pth"), 48)
    judge = Discriminator(tiny("ddpmpp"))
    for network, given in ((lpips, (2, 3, 32, 32)), (judge, (2, 32, 4, 4))):
        compile_network(network, "eager")
        before = compiled_graphs()
        for _ in range(2):
            images = [torch.rand(given, requires_grad=i == 0) for i in range(1 + (network is lpips))]
            expected = torch.compiler.disable(network.forward)(*images)
            torch.testing.assert_close(network(*images), expected)
            network(*images).sum().backward()
            with torch.no_grad():
                network(*images)
        assert compiled_graphs() - before == 2


def test_modes_and_backends_that_can_be_asked_for():
    with_cuda_graphs = []
    for value in (True, False, "inductor", "aot_eager", "cudagraphs", *MODES):
        check_compile("trainer.compile", value)
        with_cuda_graphs += [value] if uses_cuda_graphs(value) else []
    assert with_cuda_graphs == ["cudagraphs", "reduce-overhead", "max-autotune"]
    for mode in MODES:
        options = torch._inductor.list_mode_options(mode)
        assert uses_cuda_graphs(mode) == options.get("triton.cudagraphs", False)

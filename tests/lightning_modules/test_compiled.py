"""Every method trains compiled: without a graph break, and without a new graph once each kind of update was made twice.

At the beginning of a step nothing lives that CUDA graphs of the step before have written: no output, no gradient.
"""

import pytest
import pytorch_lightning as pl
import torch
from compiler_tools import RETURNED, compiled_graphs, counted_compilation
from method_runs import METHODS, train

from callbacks import EMA
from callbacks.network_layout import all_networks

__all__ = ["counted_compilation"]
pytestmark = pytest.mark.usefixtures("counted_compilation")
GAN = {
    "generator": 1.0,
    "fake": 1.0,
    "sigmas": {"_target_": "stillhouse.diffusion.noise_levels.LogNormal", "mean": -1.2, "std": 1.2},
}
CASES = {
    **{name: (name, {}) for name in METHODS},
    "a GAN": ("diff_instruct", {"method.gan": GAN}),
    "both updates in a step": ("diff_instruct", {"method.two_sided": True}),
    "checkpointing": ("sid", {"method.checkpointing": True}),
    "three updates to one": ("disback", {"method.fake_updates": 3, "method.interval": 1}),
    "several numbers of steps": ("sfd", {"method.steps": [1, 2, 3]}),
    "branches": ("b_dense progressive", {"method.branches": 2}),
    "two losses": ("bezier", {"method.drift": 1.0}),
}


class Watch(pl.Callback):
    """Counts graphs after each step, and samples the averaged student in between, as measurements in training do."""

    def __init__(self):
        self.graphs = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        assert all(memory.expired() for memory in RETURNED)
        assert RETURNED or not self.graphs  # the step before was compiled
        RETURNED.clear()
        assert all(p.grad is None for network in all_networks(pl_module) for p in network.parameters())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.graphs.append(compiled_graphs())
        labels = torch.tensor([0, 1]) if pl_module.student.network.num_classes else None
        ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))
        with ema.applied(pl_module):
            pl_module.sample(torch.randn(2, *pl_module.image_shape), labels)


def graphs_of(name, changes, **data):
    watch = Watch()
    compiled = {
        "trainer.compile": "recording",
        "trainer.micro_batch": 3,
        "callbacks.ema": {"_target_": "callbacks.EMA"},
    }
    length = {"method.kimg": 0.06, "trainer.validate_every_n_steps": 3}  # 12 steps of 5 images, in 2 and 3
    run = train(name, compiled | length | changes, watch, **data)
    assert all(network._compiled_call_impl is None for network in all_networks(run.method))
    twice = 2 * len(run.method.update_cycle)
    assert len(watch.graphs) > twice
    assert watch.graphs[twice - 1] == watch.graphs[-1]
    return watch.graphs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_training_makes_its_graphs_in_its_first_updates(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, changes = CASES[case]
    assert graphs_of(name, changes | {"trainer.precision": "bf16-mixed"})


def test_alternating_updates_have_a_graph_for_each_network_kind_of_pass_and_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Scores and generator with a gradient, the generator and the scores without: the same form, and so the same graphs.
    assert graphs_of("diff_instruct", {}, data="eight_gaussians") == 2 * 3

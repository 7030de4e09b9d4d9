"""Micro-batches: the gradient, the logged values and the random numbers of the whole batch, whatever the method."""

import pytest
import torch
from method_runs import METHODS, STEPS, train

CASES = {name: (name, {}) for name in METHODS} | {
    "two-sided": ("diff_instruct", {"method.two_sided": True}),
    "gan": ("diff_instruct", {"method.gan": {"generator": 0.1, "fake": 0.1, "sigmas": "${noise_levels.karras}"}}),
    "noisy targets": ("denoising_student", {"method.target_noise": 0.1}),
    "shuffled control points": ("bezier", {"method.shuffled": True}),
}


def assert_close(ours, theirs):
    """But for rounding, of which the second step sees the first one's."""
    last_round = theirs.method.steps_before  # of progressive distillation, whose earlier ones were stages
    assert len(ours.gradients) == len(theirs.gradients) >= STEPS - last_round
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        size = max(float(g.abs().max()) for g in b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-4 * size)
    for a, b in zip(ours.logged, theirs.logged, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_do_what_the_whole_batch_does(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, changes = CASES[case]
    whole = train(name, changes)
    split = train(name, changes | {"trainer.micro_batch": 2})
    assert_close(split, whole)

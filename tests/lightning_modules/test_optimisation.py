"""Micro-batches: the gradient, the logged values and the random numbers of the whole batch, whatever the method; optimisers."""

import pytest
import torch
from method_runs import METHODS, STEPS, config, train, twins_slow

from launch.run.build import build_seeded

CASES = {name: (name, {}) for name in METHODS} | {
    "two-sided": ("diff_instruct", {"method.two_sided": True}),
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


@pytest.mark.parametrize("case", twins_slow(CASES))
def test_micro_batches_do_what_the_whole_batch_does(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, changes = CASES[case]
    whole = train(name, changes)
    split = train(name, changes | {"trainer.micro_batch": 2})
    assert_close(split, whole)


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("adam", {"method.weight_decay": 0.1}, torch.optim.AdamW),
        ("radam", {}, torch.optim.RAdam),
        ("radam", {"method.weight_decay": 0.1}, torch.optim.RAdam),
    ],
)
def test_an_optimiser_is_torchs_own(name, options, plain, tmp_path, monkeypatch):
    """Seven steps, of which RAdam's first five are without the second moment; weight decay is decoupled."""
    monkeypatch.chdir(tmp_path)
    options = options | {"method.optimizer": name, "method.lr": 1e-3, "method.betas": [0.8, 0.99], "method.kimg": 0.035}
    run = train("pretrain", options)
    cfg = config("pretrain", options)
    weights = list(build_seeded(cfg.method, cfg.seed).student.parameters())
    decay = {"weight_decay": options.get("method.weight_decay", 0.0)}
    decay |= {"decoupled_weight_decay": True} if name == "radam" else {}
    optimizer = plain(weights, lr=1e-3, betas=(0.8, 0.99), foreach=False, **decay)
    assert len(run.gradients) == 7
    for gradients in run.gradients:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    for ours, theirs in zip(run.method.student.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

"""Consistency distillation against its formulas, and against a mixture whose flow is solved exactly."""

import math

import pytest
import torch
from torch import nn

from closed_forms import (
    CorrectedByLevel,
    Mixture,
    MixtureData,
    energy_distance,
    exact_solution,
    exact_teacher,
    fit,
    resumed_repeats,
)
from lightning_modules import ConsistencyDistillation
from stillhouse.diffusion.preconditioning import EDM, Consistency, description_of
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, SharedMasks, TrainingStream, sample_noise
from stillhouse.diffusion.random_numbers import position_noise as positioned
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import MLP

COMMON = {"name": "cd", "batch_size": 16, "seed": 3, "kimg": 40, "lr": 1e-3, "optimizer": "radam"}
BATCH = {"image": Mixture().sample(16, torch.Generator().manual_seed(1)).float(), "position": torch.arange(40, 56)}


def cd(teacher=None, **options):
    torch.manual_seed(0)  # of the networks' trainable parts
    return ConsistencyDistillation(teacher or exact_teacher(network=CorrectedByLevel), **(COMMON | options))


def mlp(dropout=0.5):
    """A teacher whose network has dropout, and no layer that is zero."""
    torch.manual_seed(0)
    network = MLP(1, 2, 2, width=16, num_blocks=2, dropout=dropout)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return Teacher("mlp", network, EDM(), karras, steps=4)


def latents(count=1024):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.student.parameters()), allow_unused=True)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halflife", [0, 0.05])
def test_the_loss_is_the_papers_and_its_target_has_no_gradient(halflife):
    """Algorithm 2 by hand in float64, with f of appendix C; the average is another network than the student here."""
    module = cd(mlp(0.0), target_halflife=halflife)
    student, teacher = module.student.network, module.teacher.denoiser
    target = module.average.network if halflife else student
    if halflife:
        for parameter in target.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)

    def f(network, x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        out = network((x / (s**2 + 0.25).sqrt()).float(), (sigma.log() / 4).float())
        return 0.25 / ((s - 0.002) ** 2 + 0.25) * x + 0.5 * (s - 0.002) / (s**2 + 0.25).sqrt() * out

    seen = []
    handle = module.student.register_forward_hook(lambda _, args, out: seen.append(args))
    loss = module.loss(BATCH)
    found = gradients(loss, module)
    handle.remove()
    x_t, t, _ = (value if value is None else value.double() for value in seen[0])
    grid = torch.tensor(
        [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)], dtype=torch.float64
    )
    n = (grid - t[:, None]).abs().argmin(1)
    assert len(n.unique()) > 8
    assert n.max() < 17
    t, r = grid[n], grid[n + 1]
    z = positioned(3, BATCH["position"], (2, 1, 1), TrainingStream.NORMALS)
    torch.testing.assert_close(x_t, BATCH["image"] + t.view(-1, 1, 1, 1) * z.double(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        t_, r_ = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        first = (x_t - teacher(x_t, t)) / t_
        end = x_t + (r_ - t_) * first
        x_r = x_t + (r_ - t_) / 2 * (first + (end - teacher(end, r)) / r_)
        answer = f(target, x_r, r)
    expected = (f(student, x_t, t) - answer).square().flatten(1).sum(1).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, theirs in zip(found, gradients(expected, module), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=1e-3 * theirs.abs().max().item())
    if halflife:
        assert not any(p.requires_grad or p.grad is not None for p in module.average.parameters())


class Flow(nn.Module):
    """The mixture's path from each state to noise level sigma_min, by a solver of high order."""

    def forward(self, x, sigma, labels=None):
        end = x.double().clone()
        for level in sigma.unique().tolist():
            chosen = sigma == level
            if level > 0.002001:
                end[chosen] = exact_solution(x[chosen].double(), level, 0.002)
        return end.float()


@pytest.mark.slow
def test_the_exact_flow_has_the_error_of_the_teachers_step():
    """Heun's local error is of order 3: twice as many levels divide the distance by about 8, more than the step's square."""
    losses = []
    for levels in (20, 40):
        module = cd(exact_teacher(), levels=levels, loss="l1")
        module.student = Flow()
        losses.append(module.loss({name: values[:6] for name, values in BATCH.items()}).item())
    assert losses[1] < losses[0] / 4
    assert losses[1] < 0.02


@pytest.mark.parametrize("halflife", [0, 0.05])
def test_equal_levels_have_no_loss_with_equal_dropout_masks(halflife, monkeypatch):
    """Also in micro-batches, and by the average, which begins as the student; with masks of their own the passes differ."""
    module = cd(mlp(), target_halflife=halflife)
    module.sigmas.fill_(1.5)
    module.micro_batch = 6
    for batch in module.micro_batches(BATCH):
        loss = module.loss(batch)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients(loss, module))
    monkeypatch.setattr(SharedMasks, "__enter__", lambda self: None)
    assert module.loss(BATCH) > 0.01


def test_the_student_is_the_identity_at_the_lowest_level():
    module = cd(mlp(0.0), sigma_min=0.01)
    x = torch.randn(5, 2, 1, 1)
    assert torch.equal(module.student(x, torch.tensor(0.01)), x)
    assert description_of(module.student.preconditioning) == description_of(Consistency(EDM(), 0.01))
    assert module.sigmas[-1].item() == pytest.approx(0.01)


def test_the_target_network_is_an_average_by_its_half_life():
    """The published decay of 0.95 per update of 2048 images, and one of 0.75 followed for an update."""
    published = cd(batch_size=2048, target_halflife=27.675)
    assert published.target_decay == pytest.approx(0.95, abs=1e-5)
    assert cd().average is None
    halflife = 16 * math.log(0.5) / math.log(0.75) / 1000
    module = cd(target_halflife=halflife, kimg=0.016)
    before = [p.clone() for p in module.average.parameters()]
    fit(module, MixtureData(16))
    for old, p, q in zip(before, module.average.parameters(), module.student.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, 0.75 * old + 0.25 * q)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "halflife"),
    [
        pytest.param("32-true", 0.2, marks=pytest.mark.slow),
        pytest.param("32-true", 0, marks=pytest.mark.slow),
        pytest.param("bf16-mixed", 0.2, marks=pytest.mark.slow),
    ],
)
def test_it_learns_the_mixture(precision, halflife):
    """One evaluation of the teacher gives the mean of all; of the student nearly the mixture, and so do two."""
    real = Mixture().sample(1024, torch.Generator().manual_seed(1))
    module = cd(batch_size=128, kimg=32, lr=1e-2, seed=0, target_halflife=halflife, middle=2.0)
    before = energy_distance(module.sample(latents()), real)
    fit(module, MixtureData(128), precision=precision)
    assert before > 0.3
    for nfe in (1, 2):
        module.chosen_nfe = nfe
        assert energy_distance(module.sample(latents()), real) < 0.15 * before


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    """With dropout, and a target network of its own."""

    def fresh():
        return cd(mlp(), batch_size=8, kimg=0.048, target_halflife=0.01)

    whole = resumed_repeats(fresh, MixtureData(8), tmp_path)
    assert any(key.startswith("average.") for key in whole.state_dict())


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_renoised_from_the_lowest_level():
    module = cd(middle=[24.0, 0.2], sigma_min=0.01)
    assert module.sampling().sigmas == [80.0, 0.0]
    assert module.sampling(3).sigmas == [80.0, 24.0, 0.2, 0.0]
    levels = [(80 ** (1 / 7) + i / 2 * (0.01 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(2)]
    assert module.sampling(2).sigmas == pytest.approx([*levels, 0])
    assert {(s.solver, s.options["sigma_min"]) for s in map(module.sampling, (1, 2, 3))} == {("renoising", 0.01)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "method.levels must be an integer of at least 2, got 1"),
        ({"sigma_min": 80}, "method.sigma_min must lie between 0 and the teacher's highest level 80, got 80"),
        ({"rho": 0}, "method.rho must be positive, got 0"),
        ({"target_halflife": -1}, "method.target_halflife must not be negative, got -1; 0: the target is the student"),
        ({"loss": "l3"}, "method.loss must be one of l2, l1, huber, lpips, lpips.l2, got 'l3'"),
        ({"middle": 0.001}, "method.middle must be a noise level between 0.002 and 80, or descending ones, got 0.001"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        cd(**options)

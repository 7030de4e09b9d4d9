"""Continuous-time consistency models against their formulas, and against Gaussians, whose consistency function is known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from closed_forms import (
    MEANS,
    CorrectedByLevel,
    Mixture,
    MixtureData,
    column,
    energy_distance,
    exact_teacher,
    fit,
    resumed_repeats,
)
from lightning_modules import SCM
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import (
    HELD_OUT_SEEDS,
    SharedMasks,
    TrainingStream,
    position_noise,
    position_uniforms,
    sample_noise,
)
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import MLP

COMMON = {"name": "scm", "batch_size": 16, "seed": 3, "kimg": 40, "lr": 1e-3, "optimizer": "radam"}
GAUSSIAN = Mixture(MEANS[:1])
BATCH = {"image": Mixture().sample(16, torch.Generator().manual_seed(1)).float(), "position": torch.arange(40, 56)}
KINDS = ("forward", "finite")


def scm(teacher=None, step=0, **options):
    """At a training step, outside of a trainer."""
    torch.manual_seed(0)  # of the networks' trainable parts
    module = SCM(teacher or exact_teacher(network=CorrectedByLevel), **(COMMON | options))
    module.trainer = SimpleNamespace(global_step=step)
    return module


def mlp(dropout=0.5, seed=0):
    """A teacher whose network has dropout, and no layer that is zero."""
    torch.manual_seed(seed)
    network = MLP(1, 2, 2, width=16, num_blocks=2, dropout=dropout)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return Teacher("mlp", network, EDM(), karras, steps=4)


def moved(module):
    """The module with a student that is no longer its teacher, and a u that is not zero."""
    torch.manual_seed(2)
    for parameter in (*module.student.parameters(), *module.log_variance.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return module


def drawn(module, batch):
    """sigma, t, z of a batch, float64."""
    (u,) = position_uniforms(3, batch["position"], TrainingStream.UNIFORMS, 1)
    sigma = (module.noise_levels.mean + module.noise_levels.std * torch.special.ndtri(u)).exp()
    z = 0.5 * position_noise(3, batch["position"], (2, 1, 1), TrainingStream.NORMALS).double()
    return sigma, (sigma / 0.5).atan(), z


class ExactConsistencyNetwork(nn.Module):
    """F_edm of f(x, sigma) = mean + std (x - mean) / sqrt(std^2 + sigma^2), which maps noised Gaussian data to their ends."""

    in_channels = out_channels = 2
    resolution, num_classes = 1, 0

    def forward(self, z, noise_labels, class_labels=None):
        mean, std = GAUSSIAN.means[0].view(2, 1, 1), GAUSSIAN.std
        sigma = column((4 * noise_labels.double()).exp())
        x = z.double() * (sigma**2 + 0.25).sqrt()
        end = mean + std * (x - mean) / (std**2 + sigma**2).sqrt()
        return ((end - 0.25 / (sigma**2 + 0.25) * x) / (0.5 * sigma / (sigma**2 + 0.25).sqrt())).float()


def exact(**options):
    module = scm(exact_teacher(GAUSSIAN), **options)
    module.student = Denoiser(ExactConsistencyNetwork(), EDM())
    return module


def tangent(module, batch):
    """g before it is normalised, at the batch's images, noise and levels."""
    _, t, z = drawn(module, batch)
    cos, sin = column(t.cos()), column(t.sin())
    images = batch["image"].double()
    x_t = cos * images + sin * z
    v = module.velocity(x_t, t, cos * z - sin * images, None)
    output = (cos * x_t - module.student(x_t / cos, 0.5 * t.tan())) / (0.5 * sin)
    return module.tangent(output, x_t, t, v, None, SharedMasks())


def latents(count=1024):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


# -- the tangent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_consistency_function_has_no_tangent(kind):
    """Along the exact flow f does not change; half of the derivative leaves a tangent."""
    g = tangent(exact(derivative=kind), BATCH)
    assert g.abs().max() < 1e-3
    half = tangent(exact(derivative=kind, tangent_warmup_kimg=0.32, step=10), BATCH)
    assert half.abs().mean() > 0.05


def test_in_training_from_data_its_tangent_is_zero_in_the_mean():
    """Of one image g is of the size of v; given x_t it vanishes in the mean, and so does its product with a function of x_t."""
    module = exact(target="data", p_std=0.01)
    positions = torch.arange(20000)
    images = GAUSSIAN.sample(len(positions), torch.Generator().manual_seed(0)).float()
    batch = {"image": images, "position": positions}
    g = tangent(module, batch)
    _, t, z = drawn(module, batch)
    x_t = column(t.cos()) * images + column(t.sin()) * z
    size = g.square().mean().sqrt()
    assert size > 0.05
    for weight in (torch.ones_like(x_t), (x_t - x_t.mean(0)) / x_t.std()):
        assert (g * weight).mean(0).abs().max() < 4 * size / len(positions) ** 0.5


@pytest.mark.parametrize("target", ["teacher", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_papers(kind, target):
    """With F = (cos(t) x_t - D) / (s sin(t)) dF/dt by torch.func.jvp, and the loss's gradient by hand."""
    module = moved(scm(mlp(0.0), target=target, derivative=kind, tangent_warmup_kimg=0.16, step=7))
    sigma, t, z = drawn(module, BATCH)
    images = BATCH["image"].double()
    cos, sin = column(t.cos()), column(t.sin())
    x_t = cos * images + sin * z

    def output(x, t, denoiser=module.student):
        return (column(t.cos()) * x - denoiser(x / column(t.cos()), 0.5 * t.tan())) / (0.5 * column(t.sin()))

    v = 0.5 * output(x_t, t, module.teacher.denoiser) if target == "teacher" else cos * z - sin * images
    F = output(x_t, t)
    dF = torch.func.jvp(output, (x_t, t), (v, torch.ones_like(t)))[1]
    r = 7 / 10
    g = (-(cos**2) * (0.5 * F - v) - r * cos * sin * (x_t + 0.5 * dF)).detach()
    g = g / (column(g.square().flatten(1).mean(1).sqrt()) + 0.1)
    u = module.log_variance(sigma).double()
    weight = (-u).exp() / sigma
    loss = module.loss(BATCH)
    tolerance = {"rtol": 1e-3 if kind == "forward" else 1e-2, "atol": 1e-5}
    torch.testing.assert_close(loss.double(), (weight * g.square().flatten(1).mean(1) + u).mean(), **tolerance)
    parameters = list(module.student.parameters())
    expected = torch.autograd.grad((-column(weight).detach() * g * F).sum() / len(g), parameters)  # 2 / (two values)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance["rtol"] * theirs.abs().max().item() + 1e-9)
    (of_u,) = torch.autograd.grad(loss, module.log_variance.layer.bias)
    assert of_u.item() == pytest.approx((1 - weight * g.square().flatten(1).mean(1)).mean().item(), abs=1e-2)


def test_both_kinds_agree_with_dropout():
    """In the ordinary pass and in the derivative's, the masks are the same."""
    losses = []
    for kind in KINDS:
        module = moved(scm(mlp(), derivative=kind))
        torch.manual_seed(4)
        losses.append(module.loss(BATCH).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    torch.manual_seed(5)
    assert module.loss(BATCH).item() != pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize(("target", "count"), [("teacher", 1), ("data", 0)])
def test_the_teacher_is_evaluated_for_distillation_alone(target, count):
    module, seen = scm(target=target), []
    module.teacher.denoiser.network.register_forward_hook(lambda *_: seen.append(1))
    module.loss(BATCH)
    assert len(seen) == count == module.evaluations.get("teacher", 0)
    assert module.frozen_networks() == module.learned_teachers() == ([module.teacher] if count else [])
    if count:  # the student is its teacher, and nothing else has been learned
        assert scm(tangent_warmup_kimg=1).loss(BATCH).abs() < 1e-6


# -- training ---------------------------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("precision", "target", "kind"),
    [
        slow("32-true", "teacher", "forward"),
        slow("bf16-mixed", "teacher", "forward"),
        slow("32-true", "teacher", "finite"),
        slow("32-true", "data", "finite"),
        slow("bf16-mixed", "data", "forward"),
    ],
)
def test_it_learns_the_mixture(precision, target, kind):
    """One evaluation of the teacher gives the mean of all; of the student nearly the mixture."""
    real = [Mixture().sample(1024, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    options = {"batch_size": 128, "kimg": 48, "lr": 5e-3, "seed": 0, "betas": (0.9, 0.99), "tangent_warmup_kimg": 8}
    module = scm(**options, target=target, derivative=kind, middle=0.5)
    before = energy_distance(module.sample(latents()), real[0])
    fit(module, MixtureData(128), precision=precision)
    one = energy_distance(module.sample(latents()), real[0])
    module.chosen_nfe = 2
    two = energy_distance(module.sample(latents()), real[0])
    assert before > 0.3
    assert one < 0.15 * before
    assert two < 0.1 * before


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    """With dropout, a tangent that grows, RAdam, and a learning rate that falls."""

    def fresh():
        return scm(mlp(), batch_size=8, kimg=0.048, tangent_warmup_kimg=0.04, lr_decay_kimg=0.024)

    whole = resumed_repeats(fresh, MixtureData(8), tmp_path)
    assert any("log_variance" in name for name in whole.state_dict())


def test_samples_are_renoised_at_the_middle_level():
    module = exact()
    assert module.sampling().sigmas == [80.0, 0.0]
    assert module.sampling(2).sigmas == [80.0, 0.98, 0.0]
    for nfe in (1, 2, 4):
        module.chosen_nfe = nfe
        assert (
            energy_distance(module.sample(latents(512)), GAUSSIAN.sample(512, torch.Generator().manual_seed(3))) < 0.01
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "images"}, "method.target must be one of teacher, data, got 'images'"),
        ({"derivative": "jvp"}, "method.derivative must be one of forward, finite, got 'jvp'"),
        ({"p_std": 0}, "method.p_std must be above 0, got 0"),
        ({"sigma_data": 0}, "method.sigma_data must be above 0, got 0"),
        ({"c": 0}, "method.c must be above 0, got 0"),
        ({"tangent_warmup_kimg": -1}, "method.tangent_warmup_kimg must not be negative, got -1"),
        ({"lr_decay_kimg": 0}, "method.lr_decay_kimg must be above 0, got 0"),
        ({"middle": 80}, "method.middle must be a noise level between 0 and 80, or descending ones, got 80"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        scm(**options)

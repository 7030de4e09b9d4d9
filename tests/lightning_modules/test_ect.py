"""Easy consistency tuning against its formulas, and against Gaussians, whose consistency function is known exactly."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from closed_forms import (
    MEANS,
    CorrectedByLevel,
    Mixture,
    MixtureData,
    energy_distance,
    exact_teacher,
    fit,
    resumed_repeats,
)
from lightning_modules import ECT
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
from stillhouse.networks.compiling import compile_network

COMMON = {"name": "ect", "batch_size": 16, "seed": 3, "kimg": 40, "lr": 1e-3, "optimizer": "radam"}
GAUSSIAN = Mixture(MEANS[:1])
BATCH = {"image": Mixture().sample(16, torch.Generator().manual_seed(1)).float(), "position": torch.arange(40, 56)}


def ect(teacher=None, step=0, **options):
    """At a training step, outside of a trainer."""
    torch.manual_seed(0)  # of the networks' trainable parts
    module = ECT(teacher or exact_teacher(network=CorrectedByLevel), **(COMMON | options))
    module.trainer = SimpleNamespace(global_step=step)
    return module


def mlp(dropout=0.5):
    """A teacher whose network has dropout, and no layer that is zero."""
    torch.manual_seed(0)
    network = MLP(1, 2, 2, width=16, num_blocks=2, dropout=dropout)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return Teacher("mlp", network, EDM(), karras, steps=4)


def written_out(module, batch):
    """t, r, x_t and the noise z of a batch by the paper's formulas, r rounded as floats are."""
    (u,) = position_uniforms(3, batch["position"], TrainingStream.UNIFORMS, 1)
    t = (module.noise_levels.mean + module.noise_levels.std * torch.special.ndtri(u)).exp()
    sigmoid = 1 / (1 + (module.b * t).exp())
    r = (t * (1 - (1 + module.k * sigmoid) / module.q ** (module.stage + 1))).clamp(min=0)
    z = position_noise(3, batch["position"], (2, 1, 1), TrainingStream.NORMALS)
    return t, r, batch["image"] + t.view(-1, 1, 1, 1) * z, z


def latents(count=1024):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


# -- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "options", "t", "ratio"),
    [
        (0, {}, 0.5, 0.0),  # 1 - (1 + 8 / (1 + e^0.5)) / 2 < 0
        (0, {}, 80.0, 0.5),
        (199, {}, 80.0, 0.5),  # 199 * 16 images: the first stage still
        (200, {}, 80.0, 0.75),
        (650, {}, 1.0, 1 - (1 + 8 / (1 + math.e)) / 16),
        (650, {"max_ratio": 0.9}, 1.0, 1 - 0.1 * (1 + 8 / (1 + math.e))),
        (650, {"stage_kimg": None, "q": 256}, 2.0, 1 - (1 + 8 / (1 + math.e**2)) / 256),
        (0, {"q": 16, "k": 3, "b": 0.5}, 4.0, 1 - (1 + 3 / (1 + math.e**2)) / 16),
    ],
)
def test_the_mapping_is_the_papers(step, options, t, ratio):
    """r / t by hand; a stage begins at a number of images."""
    module = ect(step=step, **({"stage_kimg": 3.2} | options))
    relative = module.relative_step(torch.tensor([t], dtype=torch.float64))
    assert 1 - relative.item() == pytest.approx(ratio, rel=1e-12, abs=1e-15)


def test_close_levels_keep_their_digits():
    """x_t - x_r is (t - r) z to the last digits also where float32 would hardly tell t and r apart."""
    module = ect(q=2.0**30, teacher_step=None)
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args))
    module.student.forward = lambda x, sigma, labels=None: seen.append((x, sigma)) or x
    module.loss(BATCH)
    (x_t, t), (x_r, r) = seen
    _, _, _, z = written_out(module, BATCH)
    step = t * (1 + 8 * torch.sigmoid(-t)) / 2**30
    torch.testing.assert_close((x_t - x_r) / step.view(-1, 1, 1, 1), z.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((t - r) / step, torch.ones_like(t), rtol=1e-6, atol=0)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.06])
@pytest.mark.parametrize("weighting", ["step", "c_out"])
def test_the_loss_is_the_papers_and_its_target_has_no_gradient(weighting, c):
    module = ect(mlp(0.0), q=4, weighting=weighting, c=c)
    t, r, x_t, z = written_out(module, BATCH)
    assert (r > 0).any()
    assert not (r > 0).all()
    with torch.no_grad():
        x_r = BATCH["image"] + r.view(-1, 1, 1, 1) * z
        target = torch.where(r.view(-1, 1, 1, 1) > 0, module.student(x_r, r.clamp(min=1e-3)), BATCH["image"])
    norm = (module.student(x_t, t) - target).flatten(1).norm(dim=1)
    weight = 1 / (t - r) if weighting == "step" else (t**2 + 0.25) / (0.5 * t) ** 2
    expected = (weight * ((norm**2 + c**2).sqrt() - c)).mean()
    loss, parameters = module.loss(BATCH), list(module.student.parameters())
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_the_largest_steps_are_a_denoising_regression():
    """q -> 1: r = 0 everywhere, and the target is the image, whatever the student says of it."""
    module = ect(mlp(0.0), q=1.0001)
    t, r, x_t, _ = written_out(module, BATCH)
    assert not r.any()
    expected = ((module.student(x_t, t) - BATCH["image"]).flatten(1).norm(dim=1) / t).mean()
    torch.testing.assert_close(module.loss(BATCH), expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_equal_levels_have_no_loss_with_equal_dropout_masks(backend, monkeypatch):
    """q -> infinity: r = t. Also in micro-batches and compiled; with masks of their own the two passes differ."""
    module = ect(mlp(), q=1e300, step=10**6, stage_kimg=16, weighting="c_out")
    parameters = list(module.student.parameters())
    if backend:
        compile_network(module.student.network, backend)
    module.micro_batch = 6
    for batch in module.micro_batches(BATCH):
        loss = module.loss(batch)
        assert loss == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, parameters))
    monkeypatch.setattr(SharedMasks, "__enter__", lambda self: None)
    assert module.loss(BATCH) > 0.1


# -- distillation -----------------------------------------------------------------------------------------------------


class ExactConsistency(nn.Module):
    """f(x, t) of N(mean, std^2): x is mean + sqrt(std^2 + t^2) e all along its path, and ends at mean + std e."""

    preconditioning = EDM()

    def __init__(self):
        super().__init__()
        self.network = nn.Identity()  # which sampling would run uncompiled

    def forward(self, x, sigma, labels=None):
        mean, std = GAUSSIAN.means[0].view(2, 1, 1), GAUSSIAN.std
        return mean + std * (x - mean) / (std**2 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()


@pytest.mark.parametrize(("teacher_step", "order"), [("euler", 2), ("heun", 3)])
def test_the_exact_consistency_function_has_the_error_of_the_teachers_step(teacher_step, order):
    """Half of the distance t - r divides it by 2^order; a teacher's step is evaluated at t, and for Heun's at r too."""
    losses = []
    for q in (64, 128):
        module = ect(exact_teacher(GAUSSIAN), q=q, k=0, p_mean=0, p_std=0.3, teacher_step=teacher_step)
        module.student = ExactConsistency()
        module.loss(BATCH)
        losses.append(module.means["consistency/distance"].item())
    assert losses[0] / losses[1] == pytest.approx(2**order, rel=0.1)
    assert losses[0] < 64.0**-order


def test_consistency_training_has_the_exact_function_as_its_mean():
    """x_r = x_0 + r z instead of the path's: the differences are of order t - r, and vanish in the mean given x_t."""
    module = ect(exact_teacher(GAUSSIAN), q=64, k=0, p_mean=0, p_std=0.01)
    module.student, ends = ExactConsistency(), []
    module.student.register_forward_hook(lambda _, args, out: ends.append(out))
    positions = torch.arange(20000)
    images = GAUSSIAN.sample(len(positions), torch.Generator().manual_seed(0)).float()
    module.loss({"image": images, "position": positions})
    difference = ends[0] - ends[1]
    size = difference.square().mean().sqrt()
    assert 0.1 / 64 < size / GAUSSIAN.std < 1 / 64
    assert (difference * ends[0]).mean().abs() < 0.03 * size * ends[0].square().mean().sqrt()
    assert (difference.mean(0).abs() < 4 * size / len(positions) ** 0.5).all()


@pytest.mark.parametrize(("teacher_step", "count"), [(None, 0), ("euler", 1), ("heun", 2)])
def test_the_teacher_is_evaluated_for_its_steps_alone(teacher_step, count):
    """To r = 0 a step ends at its estimate, which is the target there."""
    module = ect(q=1.0001, teacher_step=teacher_step)
    seen = []
    module.teacher.denoiser.register_forward_hook(lambda _, args, out: seen.append(args))
    module.loss(BATCH)
    assert len(seen) == count == module.evaluations.get("teacher", 0)
    assert module.frozen_networks() == module.learned_teachers() == ([module.teacher] if count else [])
    if count:
        assert module.means["consistency/distance"] < 1e-6  # at the start the student is the teacher
    module.teacher.weights, module.teacher.licence = "x.safetensors", "CC-BY-NC-SA-4.0"
    assert module.licence == "CC-BY-NC-SA-4.0"


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "teacher_step"),
    [
        ("32-true", None),
        pytest.param("bf16-mixed", None, marks=pytest.mark.slow),
        pytest.param("32-true", "heun", marks=pytest.mark.slow),
    ],
)
def test_it_learns_the_mixture(precision, teacher_step):
    """One evaluation of the teacher gives the mean of all; of the student nearly the mixture, and two are better."""
    real = [Mixture().sample(1024, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    options = {"batch_size": 128, "kimg": 32, "lr": 5e-3, "stage_kimg": 8, "seed": 0, "teacher_step": teacher_step}
    module = ect(**options, middle=0.5)
    before = energy_distance(module.sample(latents()), real[0])
    fit(module, MixtureData(128), precision=precision)
    one = energy_distance(module.sample(latents()), real[0])
    module.chosen_nfe = 2
    two = energy_distance(module.sample(latents()), real[0])
    assert before > 0.3
    assert one < 0.1 * before
    assert two < one


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    """With dropout, stages that end on the way, RAdam, and a learning rate that falls."""

    def fresh():
        return ect(mlp(), q=4, batch_size=8, kimg=0.048, stage_kimg=0.016, lr_decay_kimg=0.024)

    whole = resumed_repeats(fresh, MixtureData(8), tmp_path)
    assert whole.means["consistency/stage"] == 2


def test_the_learning_rate_falls_as_the_inverse_square_root():
    scales = [ect(step=step, lr_decay_kimg=0.16, warmup_kimg=0.032).lr_scale() for step in (0, 1, 9, 39)]
    assert scales == [0.5, 1, 1, 0.5]
    assert ect(step=39).lr_scale() == 1


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_renoised_at_the_middle_levels():
    module = ect(exact_teacher(GAUSSIAN, steps=10))
    module.student = ExactConsistency()
    noise = latents(512)
    end = module.student(80 * noise.double(), torch.tensor([80.0]))
    torch.testing.assert_close(module.sample(noise), end.float())
    assert module.nfe == 1
    assert module.sampling(2).sigmas == [80.0, 0.821, 0.0]
    levels = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]
    assert module.sampling(4).sigmas == pytest.approx([*levels, 0])
    module.middle = [24.0, 3.0, 0.2]
    assert module.sampling(4).sigmas == [80.0, 24.0, 3.0, 0.2, 0.0]
    for nfe in (2, 4):
        module.chosen_nfe = nfe
        images = module.sample(noise)
        assert not torch.allclose(images, end.float(), atol=0.1)
        assert energy_distance(images, GAUSSIAN.sample(512, torch.Generator().manual_seed(3))) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 1}, "method.q must be above 1, got 1"),
        ({"p_std": 0}, "method.p_std must be above 0, got 0"),
        ({"stage_kimg": 0}, "method.stage_kimg must be above 0, got 0"),
        ({"lr_decay_kimg": 0}, "method.lr_decay_kimg must be above 0, got 0"),
        ({"c": -1}, "method.c must not be negative, got -1"),
        ({"max_ratio": 1}, "method.max_ratio must lie between 0 and 1, got 1; null: no limit"),
        ({"weighting": "edm"}, "method.weighting must be one of step, c_out, got 'edm'"),
        ({"teacher_step": "ddim"}, "method.teacher_step must be one of None, euler, heun, got 'ddim'"),
        ({"middle": 80}, "method.middle must be a noise level between 0 and 80, or descending ones, got 80"),
        ({"middle": [0.5, 1.0]}, r"method.middle must be .* descending ones, got \[0.5, 1.0\]"),
        ({"optimizer": "sgd"}, "method.optimizer must be one of adam, radam, got 'sgd'"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        ect(**options)

"""Moment matching against closed forms: its states, both losses and their gradients, that it learns a mixture, and misuse."""

import math

import pytest
import torch
from test_diff_instruct import FAKE, STUDENT, Affine, batch, loss_of, unet

from closed_forms import CorrectedByLevel, Mixture, MixtureData, energy_distance, exact_teacher, fit
from lightning_modules import MomentMatching
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.sampling import one_step
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.training_noise import TrainingNoise


def method(teacher=None, kimg=1.0, lr=1e-3, batch_size=128, seed=0, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=CorrectedByLevel)
    common = {"name": "moment_matching", "batch_size": batch_size, "seed": seed, "kimg": kimg, "lr": lr}
    return MomentMatching(teacher, **common, **({"betas": (0.0, 0.99)} | options))


def images_of(count):
    return batch(count) | {"image": Mixture().sample(count, torch.Generator().manual_seed(0)).float()}


def noise_of(module, data):
    return TrainingNoise(module.seed, data["position"], module.image_shape)


def place(sigma):
    """Of noise levels on Karras' scale between 0.002 and 80: 0 and 1 at its ends."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (sigma.double() ** (1 / 7) - low) / (high - low)


# -- its states -------------------------------------------------------------------------------------------------------


def test_times_of_a_step():
    """s is uniform; t is the end of its step of the grid, or up to 1 / k higher."""
    data = images_of(20_000)
    for times in ("grid", "continuous"):
        module = method(steps=4, times=times)
        noise = noise_of(module, data)
        x, t = module.student_input(data, noise)
        _, s = module.compared(data, torch.zeros_like(x), noise, module.generator_sigmas)
        t, s = place(t), place(s)
        assert abs(s.mean() - 0.5) < 0.01
        assert abs(s.std() - 1 / math.sqrt(12)) < 0.01
        assert ((s < t) & (t < s + 0.25 + 1e-5)).all()
        if times == "grid":
            torch.testing.assert_close(t, ((4 * s).floor() + 1) / 4, rtol=0, atol=1e-6)
        else:
            inside = t < 1 - 1e-6
            assert abs((t - s)[s < 0.75].mean() - 0.125) < 0.002
            assert abs(inside.double().mean() - 0.875) < 0.01
            assert torch.equal(module.level(torch.ones(1).double()), torch.tensor([80.0]))


def test_inputs_are_images_with_noise_and_at_the_highest_level_what_sampling_begins_with():
    module = method(steps=4, times="grid")
    data = images_of(64)
    noise = noise_of(module, data)
    x, t = module.student_input(data, noise)
    grid = karras_grid(4, 0.002, 80.0)
    shown = torch.where((place(t) < 1 - 1e-6)[:, None, None, None], data["image"], 0)
    torch.testing.assert_close(x, shown + t[:, None, None, None] * noise.latents)
    assert set(t.tolist()) == set(grid[:-1].float().tolist())  # the sampler's levels
    assert module.sampling().sigmas == [*grid[:-1].tolist(), 0.0]


def test_one_step_is_a_one_step_generator():
    """With k = 1 all inputs are pure noise, and at low levels z_s is the generator's image with independent noise."""
    module = method(steps=1, times="grid")
    data = images_of(64)
    noise = noise_of(module, data)
    images = module.generate(data, noise, None)
    assert torch.equal(images, one_step(module.student, noise.latents, 80.0, None))
    torch.testing.assert_close(module.sample(noise.latents), images)
    z, s = module.compared(data, images, noise, module.generator_sigmas)
    low = s < 0.8
    assert low.sum() > 20
    apart = (z - images - s[:, None, None, None] * noise.noise).abs().amax((1, 2, 3))
    assert (apart < 0.05 * s)[low].all()


# -- both losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["grid", "continuous"])
def test_an_auxiliary_denoiser_that_is_the_teacher_gives_no_gradient(times):
    module = method(steps=2, times=times)
    loss_of(module, STUDENT, images_of(64)).backward()
    gradients = [p.grad for p in module.student.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


C, MEAN, SHIFT, KEPT, STEPS = 0.5, (0.3, -0.2), (0.5, 0.1), 0.6, 3
"""Data N(MEAN, C^2), and a generator SHIFT + KEPT (C^2 / (C^2 + t^2)) (z_t - MEAN): the posterior mean, but off by both."""


class Linear(Affine):
    def __init__(self):
        super().__init__(list(SHIFT), KEPT, 80.0)

    def forward(self, x, sigma, labels=None):
        gain = C**2 / (C**2 + sigma**2)
        mean = torch.tensor(MEAN)[:, None, None]
        return self.mean[:, None, None] + self.scale * gain[:, None, None, None] * (x - mean)


def moments(s):
    """Of x~ and z_s at levels s (N, 1) in the steps of the grid, both pixels' (N, 2): whose moments are those of normal numbers.

    Returns:
        The means of x~, z_s and z_t - MEAN, the variance of z_s, the slope of G, and the covariance of z_t with z_s.
    """
    grid = karras_grid(STEPS, 0.002, 80.0).flip(0)
    t = grid[torch.searchsorted(grid, s * (1 + 1e-6)).clamp(max=STEPS)]
    pure = t > 79  # z_t is noise alone
    mean = torch.tensor(MEAN, dtype=torch.float64)
    slope = KEPT * C**2 / (C**2 + t**2)
    start, variance = torch.where(pure, 0, mean), torch.where(pure, t**2, C**2 + t**2)
    kept = s**2 / t**2
    image = torch.tensor(SHIFT, dtype=torch.float64) + slope * (start - mean)
    passed = kept + (1 - kept) * slope  # what z_s has of z_t
    return (
        image,
        kept * start + (1 - kept) * image,
        start - mean,
        passed**2 * variance + s**2 * (1 - kept),
        slope,
        passed * variance,
    )


def of_teacher(z, s):
    mean = torch.tensor(MEAN, dtype=torch.float64)
    return mean + C**2 / (C**2 + s**2) * (z - mean)


class Expected(torch.nn.Module):
    """The auxiliary denoiser's optimum on the grid, midway between E[x~ | z_s] and the teacher, plus a bias."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, sigma, labels=None):
        z, s = x.double().flatten(1), sigma.double()[:, None]
        image, state, _, variance, slope, covariance = moments(s)
        expected = image + slope * covariance / variance * (z - state)
        return ((expected + of_teacher(z, s)) / 2).float()[:, :, None, None] + self.bias[:, None, None]


def linear_method(count):
    teacher = exact_teacher(Mixture(torch.tensor([MEAN], dtype=torch.float64), C), network=CorrectedByLevel)
    module = method(teacher, steps=STEPS, times="grid")
    module.student, module.fake_score = Linear(), Expected()
    z = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    return module, batch(count) | {"image": torch.tensor(MEAN)[:, None, None] + C * z}


def test_the_auxiliary_denoisers_optimum_lies_midway():
    """There the mean gradient vanishes at every level: a bias gets none, up to the standard error of the samples."""
    module, data = linear_method(100_000)
    loss_of(module, FAKE, data).backward()
    at_optimum = module.fake_score.bias.grad.clone()
    assert all(p.grad is None for p in module.student.parameters())
    module.zero_grad()
    module.fake_score.bias.data += 0.1
    loss_of(module, FAKE, data).backward()
    assert (at_optimum.abs() < 0.01 * module.fake_score.bias.grad.abs()).all()


def test_the_generators_gradient_is_that_of_matched_moments():
    """E < dG, A - T > by a quadrature over s, for the generator's shift and for its scale."""
    module, data = linear_method(100_000)
    loss_of(module, STUDENT, data).backward()
    s = module.level((torch.arange(3000, dtype=torch.float64)[:, None] + 0.5) / 3000).double()
    image, state, start, variance, slope, covariance = moments(s)
    # A - T is half of what x~ is expected beyond T, and linear in z_s.
    beyond = (image - of_teacher(state, s)) / 2
    gain = (slope * covariance / variance - C**2 / (C**2 + s**2)) / 2
    by_shift = beyond.mean(0)
    by_scale = (slope / KEPT * (start * beyond + gain * covariance)).mean(0).sum()
    assert by_shift.abs().min() > 0.02
    torch.testing.assert_close(module.student.mean.grad.double(), by_shift, rtol=0.02, atol=0)
    assert module.student.scale.grad.item() == pytest.approx(by_scale.item(), rel=0.03)


# -- samples and learning ---------------------------------------------------------------------------------------------


def test_samples_take_as_many_steps_as_are_trained_or_more():
    module = method(steps=2)
    assert [module.sampling(n).nfe for n in (None, 2, 3, 8)] == [2, 2, 3, 8]
    assert module.sampling(3).sigmas == [*karras_grid(3, 0.002, 80.0)[:-1].tolist(), 0.0]
    with pytest.raises(ValueError, match="steps=1: the student takes 2 or more"):
        module.sampling(1)
    with pytest.raises(ValueError, match="steps=3: the student takes 2, and no other number"):
        method(steps=2, times="grid").sampling(3)
    images = MixtureData(8)
    assert module.training_data(images) is images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "precision"),
    [({"times": "grid"}, "32-true"), ({}, "32-true"), ({}, "bf16-mixed")],
)
def test_it_learns_the_mixture(options, precision):
    """Of the energy distance to the mixture that the teacher's ancestral sampler has, under a seventh is left."""
    module = method(kimg=204.8, steps=2, fake_lr_factor=2.0, **options)
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, MixtureData(128), precision=precision)
    after = energy_distance(module.sample(noise), real)
    assert before > 0.2
    assert after < before / 7


def test_learning_rates_fall_to_zero():
    for decays, rates in ((True, [1e-3, 7.5e-4, 5e-4, 2.5e-4]), (False, [1e-3] * 4)):
        module = method(kimg=0.032, batch_size=8, linear_decay=decays)
        seen = []
        original = module.training_step

        def step(*arguments, module=module, seen=seen, original=original):
            seen.append(module.trainer.optimizers[0].param_groups[0]["lr"])
            return original(*arguments)

        module.training_step = step
        fit(module, MixtureData(8))
        assert seen == pytest.approx(rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "method.steps must be an integer of at least 1, got 0"),
        ({"times": "all"}, "method.times must be one of continuous, grid, got 'all'"),
        ({"weighting": "snr"}, "method.weighting must be one of edm, dmd, got 'snr'"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(unet(), **options)

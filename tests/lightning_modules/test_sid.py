"""SiD's loss and gradient against formulas and closed forms, and that it learns a mixture whose scores are known."""

import pytest
import torch
from test_diff_instruct import STUDENT, Affine, Exact, batch, loss_of

from closed_forms import CorrectedByLevel, Mixture, energy_distance, exact_teacher, fit
from lightning_modules import SiD
from stillhouse.diffusion.losses import score_identity_loss
from stillhouse.diffusion.noise_levels import KarrasGrid, LogNormal
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.training_noise import TrainingNoise

LEVELS = KarrasGrid(levels=1000, first=0, last=799)
OPTIONS = {"sigma_init": 2.5, "generator_sigmas": LEVELS, "fake_sigmas": LogNormal(-1.2, 1.2), "betas": (0.0, 0.999)}


def method(teacher=None, kimg=1.0, lr=1e-3, batch_size=128, seed=0, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=CorrectedByLevel)
    common = {"name": "sid", "batch_size": batch_size, "seed": seed, "kimg": kimg, "lr": lr}
    return SiD(teacher, **common, **(OPTIONS | options))


def test_the_loss_at_its_special_points():
    images, fake, target = torch.randn(3, 5, 2, 4, 4).unbind()
    size = (images - target).abs().mean((1, 2, 3))
    half = ((target - images).square() - (fake - images).square()).sum((1, 2, 3)) / (2 * size)
    torch.testing.assert_close(score_identity_loss(images, fake, target, 0.5), half)
    assert not score_identity_loss(images, target, target, 1.2).any()
    largest = score_identity_loss(images, fake, images, 0.0)  # where w would be zero
    torch.testing.assert_close(largest, torch.zeros(5), atol=0, rtol=0)


def test_where_both_scores_are_exact_the_expectation_is_one_minus_alpha_times_their_distance():
    """E <T - F, T - y> = E |T - F|^2, since E[y | x] = F(x): the identity behind the loss, here without w."""
    mu, t, m, s = torch.tensor([0.4, -0.3]), 0.5, torch.tensor([-0.2, 0.1]), 0.2
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.5])
    y = mu[:, None, None] + t * torch.randn(400_000, 2, 1, 1, generator=generator)
    x = y + sigma * torch.randn(y.shape, generator=generator)
    fake, target = Exact(mu.tolist(), t)(x, sigma), Exact(m.tolist(), s)(x, sigma)
    size = (y - target).abs().flatten(1).mean(1).clamp_min(1e-5)
    measured = (score_identity_loss(y, fake, target, 1.2) * size).mean().item()
    # T - F is linear in x: a (x - mu) + b for each of two pixels, with x - mu of variance t^2 + sigma^2.
    keep_target, keep_fake = s**2 / (s**2 + 0.25), t**2 / (t**2 + 0.25)
    shift = (1 - keep_target) * (m - mu)
    distance = (shift.square() + (keep_target - keep_fake) ** 2 * (t**2 + 0.25)).sum().item()
    assert measured == pytest.approx((1 - 1.2) * distance, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}], ids=["plain", "checkpointed"])
def test_the_generators_gradient_goes_through_both_scores(options):
    """It is that of the whole graph in double precision, and no weight of a score gets any."""
    mu, t = [0.4, -0.3], 0.5
    module = method(exact_teacher(Mixture(torch.tensor([[-0.2, 0.1]], dtype=torch.float64), 0.2)), **options)
    module.student, module.fake_score = Affine(mu, t, 2.5), method().fake_score
    loss_of(module, STUDENT, batch(64)).backward()
    assert all(p.grad is None for p in module.fake_score.parameters())

    noise = TrainingNoise(0, torch.arange(64), (2, 1, 1))
    mean, scale = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mu, t))
    y = mean[:, None, None] + scale * noise.latents.double()
    sigma = noise.sigma(LEVELS)
    x = y + sigma.double()[:, None, None, None] * noise.noise.double()
    target, fake = module.teacher.denoiser(x, sigma), module.fake_score(x, sigma)
    w = (y - target).detach().abs().mean((1, 2, 3), keepdim=True)
    ((target - fake) * ((target - y) - 1.2 * (target - fake)) / w).sum((1, 2, 3)).mean().backward()
    torch.testing.assert_close(module.student.mean.grad.double(), mean.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(module.student.scale.grad.double(), scale.grad, rtol=1e-3, atol=1e-5)


def test_equal_scores_leave_the_generator_where_it_is():
    module = method()  # whose fake score begins as the teacher
    loss_of(module, STUDENT, batch(8)).backward()
    gradients = [p.grad for p in module.student.parameters() if p.grad is not None]
    assert gradients
    assert max(g.abs().max() for g in gradients) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_the_mixture(precision):
    """Of the energy distance to the mixture that the untrained generator has, under a tenth is left."""
    module = method(kimg=51.2)
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, None, precision=precision)
    after = energy_distance(module.sample(noise), real)
    print(before, after)
    assert before > 0.2
    assert after < 0.1 * before


def test_evaluations_count_what_checkpointing_repeats():
    assert method().evaluations == {"student": 1.0, "fake score": 1.0, "teacher": 0.5}
    assert method(checkpointing=True).evaluations == {"student": 1.0, "fake score": 1.5, "teacher": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "method.alpha must not be negative, got -0.1"),
        ({"gan": None}, "method.gan is no option of SiD"),
        ({"weighting": "dmd"}, "method.weighting is no option of SiD"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)

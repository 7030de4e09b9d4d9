"""What a student says of its sampling: exact where the truth is known, and equal to the solvers however it is carried out."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from closed_forms import Mixture
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.solvers import SOLVERS, ancestral, ancestral_step, renoising

MEAN, STD, SIGMA_MIN = torch.tensor([0.3, -0.2], dtype=torch.float64).view(2, 1, 1), 0.5, 0.1
VARIANCE = STD**2 + SIGMA_MIN**2
COUNT = 20_000


def consistency(x, sigma, labels=None):
    """The exact consistency function of data N(MEAN, STD^2 I): along the probability-flow ODE from sigma to SIGMA_MIN."""
    return MEAN + (x - MEAN) * math.sqrt(VARIANCE / (STD**2 + sigma**2))


@pytest.mark.parametrize("levels", [(5.0,), (5.0, 0.8), (5.0, 2.4, 0.9, 0.1)])
def test_renoising_keeps_the_distribution_of_data_at_every_level(levels):
    """From starting states of the exact distribution: means and covariances within 5 standard errors."""
    z = sample_noise(torch.arange(COUNT), (2, 1, 1)).double()
    x = MEAN + math.sqrt(STD**2 + levels[0] ** 2) * z
    states = renoising(consistency, x, torch.tensor([*levels, 0.0]), sigma_min=SIGMA_MIN)
    for state, level in zip(states, [*levels[1:], SIGMA_MIN], strict=True):
        variance = STD**2 + level**2
        flat = (state - MEAN).flatten(1)
        assert flat.mean(0).abs().max() < 5 * math.sqrt(variance / COUNT)
        covariance = flat.T @ flat / COUNT
        assert (covariance - variance * torch.eye(2)).abs().max() < 5 * variance * math.sqrt(2 / COUNT)
    share = (
        1
        if len(levels) == 1
        else math.prod(  # of the starting noise that is left; the rest is new
            math.sqrt(VARIANCE / (STD**2 + level**2)) for level in levels[1:]
        )
    )
    correlation = (flat * z.flatten(1)).mean() / math.sqrt(VARIANCE)
    assert correlation.item() == pytest.approx(share, abs=0.03)


def test_an_ancestral_step_is_ddpms():
    """Mean and variance of its equation 7, in its own variables, between two neighbouring levels of its schedule."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    z, x0, noise = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for t in (1, 30, 999):
        before, after, beta = signal[t], signal[t - 1], betas[t]
        mean = (after.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - after) * z) / (1 - before)
        expected = mean + ((1 - after) / (1 - before) * beta).sqrt() * noise
        levels = (((1 - share) / share).sqrt() for share in (before, after))
        ours = ancestral_step(z / before.sqrt(), x0, *levels, noise)
        torch.testing.assert_close(after.sqrt() * ours, expected, rtol=1e-9, atol=1e-9)


def test_ancestral_sampling_of_clean_images_keeps_the_distribution_of_data_at_every_level():
    """Each estimate is a sample of what the state may come from: means and covariances within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)

    def possible(x, sigma, labels=None):
        share = STD**2 / (STD**2 + sigma**2)
        return MEAN + share * (x - MEAN) + share.sqrt() * sigma * torch.randn(x.shape, generator=generator).double()

    x = MEAN + math.sqrt(STD**2 + 25) * sample_noise(torch.arange(COUNT), (2, 1, 1)).double()
    states = list(ancestral(possible, x, torch.tensor([5.0, 2.4, 0.9, 0.1, 0.0], dtype=torch.float64)))
    assert len(states) == 4
    for state, level in zip(states, (2.4, 0.9, 0.1, 0.0), strict=True):
        variance = STD**2 + level**2
        flat = (state - MEAN).flatten(1)
        assert flat.mean(0).abs().max() < 5 * math.sqrt(variance / COUNT)
        covariance = flat.T @ flat / COUNT
        assert (covariance - variance * torch.eye(2)).abs().max() < 5 * variance * math.sqrt(2 / COUNT)


PATHS = {
    "several steps": Sampling((10.0, 3.0, 0.5, 0.0), 10.0),
    "one step": Sampling((10.0, 0.0), 10.0, double=False),
    "renoising": Sampling((10.0, 3.0, 0.5, 0.0), 10.0, "renoising", {"sigma_min": 0.1}),
    "ancestral": Sampling((10.0, 3.0, 0.5, 0.0), 10.0, "ancestral"),
    "heun above zero": Sampling((10.0, 3.0, 0.5), 10.0, "heun"),
    "analytic first step": Sampling((10.0, 3.0, 0.5, 0.0), 10.0, "heun", analytic_first=True),
    "clipped": Sampling((10.0, 3.0, 0.0), 10.0, clip=True),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_samples_do_not_depend_on_the_batch_and_evaluations_are_counted(path):
    calls = []

    def denoiser(x, sigma, labels):
        calls.append(sigma)
        return Mixture()(x, sigma)

    noise = sample_noise(torch.arange(7), (2, 1, 1))
    images = path(denoiser, noise)
    assert images.dtype == torch.float32
    assert len(calls) == path.nfe
    assert torch.equal(torch.cat([path(denoiser, part) for part in noise.split(3)]), images)
    assert torch.equal(path(denoiser, noise.flip(0)), images.flip(0))
    again = Sampling(**json.loads(json.dumps(asdict(path))))
    assert torch.equal(again(denoiser, noise), images)


def test_one_evaluation_is_the_estimate_bit_for_bit_by_every_solver():
    noise = sample_noise(torch.arange(8), (2, 1, 1))
    estimate = Mixture()(80 * noise, torch.tensor(80.0))

    def denoiser(x, sigma, labels, until=None):
        assert not until
        return Mixture()(x, sigma)

    for solver in SOLVERS:
        options = {"s_churn": 3} if solver == "stochastic_heun" else {}
        path = Sampling((80.0, 0.0), 80.0, solver, options, double=False)
        assert torch.equal(path(denoiser, noise), estimate)
        assert path.nfe == 1


def test_clipping_bounds_estimates():
    noise = sample_noise(torch.arange(100), (2, 1, 1))
    wide = Mixture(std=1.0)
    free, clipped = (Sampling((1.0, 0.5, 0.0), 2.0, clip=clip)(wide, noise) for clip in (False, True))
    assert free.abs().max() > 1
    assert clipped.abs().max() <= 1


@pytest.mark.parametrize(
    ("sigma_min", "message"), [(-1, "must not be negative, got -1"), (0.5, "must be at least sigma_min=0.5, got")]
)
def test_renoising_refuses_levels_that_it_can_not_reach(sigma_min, message):
    with pytest.raises(ValueError, match=message):
        renoising(Mixture(), torch.zeros(1, 2, 1, 1), torch.tensor([10.0, 0.4, 0.0]), sigma_min=sigma_min)

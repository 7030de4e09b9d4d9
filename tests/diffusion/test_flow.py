"""The flow's language against closed forms and diffusers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from closed_forms import FAMILIES, ExactNetwork, Mixture, exact_solution
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.flow import between, end_state, level_of, time_of, velocity
from stillhouse.diffusion.preconditioning import Velocity
from stillhouse.diffusion.schedules import flow_uniform, karras
from stillhouse.diffusion.solvers import euler, evaluations, flow_heun
from stillhouse.diffusion.time_distributions import Grid, Start, StartOrLater, Uniform, UShaped


def flow(family="velocity"):
    return Denoiser(ExactNetwork(family, Mixture()), FAMILIES[family]())


class Wave(nn.Module):
    """Any network: of its input and its time."""

    def forward(self, z, noise_labels, class_labels=None):
        return torch.sin(3 * z + noise_labels[:, None, None, None] / 100)


def states(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)
    t = torch.rand(count, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    return noise, Mixture().sample(count, generator), t


def test_times_and_levels_are_inverse():
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(time_of(level_of(t)), t)
    assert time_of(0.0) == 1
    assert level_of(0.5) == 1


def test_between_is_the_straight_line():
    noise, images, t = states()
    for i in (0, 7):
        torch.testing.assert_close(between(noise, images, t)[i], (1 - t[i]) * noise[i] + t[i] * images[i])


@pytest.mark.parametrize("family", ["edm", "v", "x0", "velocity"])
def test_every_denoiser_is_the_flow_of_the_mixture(family):
    """v = E[X_1 - X_0 | X_t] = (D - X_t) / (1 - t), from the mixture's own denoiser in double precision."""
    noise, images, t = states()
    z = between(noise, images, t)
    denoised = Mixture()(z / t[:, None, None, None], level_of(t))
    expected = (denoised - z) / (1 - t)[:, None, None, None]
    found = velocity(flow(family), z.float(), t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(end_state(flow(family), z.float(), t).double(), denoised, rtol=1e-3, atol=1e-3)


def test_the_velocity_network_is_read_as_it_is():
    """Also where t is nearly 1, and (D - z) / (1 - t) would be noise of rounding."""
    noise, images, _ = states()
    network = Wave()
    for gap in (0.5, 1e-3, 1e-6, 1e-9):
        t = torch.full((len(noise),), 1 - gap, dtype=torch.float64)
        z = between(noise, images, t).float()
        seen = []
        handle = network.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args, out)))
        found = velocity(Denoiser(network, Velocity()), z, t)
        handle.remove()
        ((inputs, noise_labels, labels), out) = seen[0]
        torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs, z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(noise_labels, (999 * t).float())
        assert labels is None


def test_euler_equals_diffusers():
    """A model that predicts e - x0 at s = 1 - t, in FlowMatchEulerDiscreteScheduler, against our Euler steps in sigma."""
    noise, *_ = states()
    steps = 12
    sigmas = flow_uniform(steps)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    times = (1 - 1 / (1 + sigmas[:-1])).numpy()
    scheduler.set_timesteps(sigmas=times.tolist())
    denoiser = flow()
    sample = noise.float()
    ours = list(euler(denoiser, noise * denoiser.preconditioning.prior_std(sigmas[0]).item(), sigmas))
    for i, timestep in enumerate(scheduler.timesteps):
        t = torch.full((len(noise),), 1 - scheduler.sigmas[i].item(), dtype=torch.float64)
        model_output = -velocity(denoiser, sample, t)
        sample = scheduler.step(model_output, timestep, sample).prev_sample
        t_next = 1 / (1 + sigmas[i + 1].item())
        torch.testing.assert_close(ours[i] * t_next, sample.double(), rtol=0, atol=2e-5)


def test_flow_heun_is_of_second_order_on_a_flows_grid():
    """Where Heun in sigma fails: its first step covers nearly all of sigma."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 2, 1, 1, generator=generator, dtype=torch.float64)
    x = 1000 * z
    end = 0.02  # of sigma; the last step to zero is an Euler step
    truth = exact_solution(x, 999.0, end)
    errors = []
    for steps in (20, 40, 80):
        t = torch.linspace(1e-3, 1 / (1 + end), steps + 1, dtype=torch.float64)
        *_, last = flow_heun(Mixture(), x, (1 - t) / t)
        errors.append((last - truth).abs().mean().item())
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates == pytest.approx([2, 2], abs=0.35)
    assert errors[-1] < 1e-3


def test_flow_heun_counts_as_it_evaluates():
    calls = []

    def denoiser(x, sigma, labels):
        calls.append(float(sigma))
        return Mixture()(x, sigma)

    found = list(flow_heun(denoiser, torch.randn(4, 2, 1, 1, dtype=torch.float64) * 80, karras(6)))
    assert len(found) == 6
    assert len(calls) == evaluations("flow_heun", 6) == 11


U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def test_time_distributions():
    start = 1e-3
    assert (Start()(U, start) == 0).all()
    uniform = Uniform()(U, start)
    assert uniform.min() > start
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx((1 + start) / 2, abs=1e-6)
    grid = Grid(4)(U, start)
    assert sorted(set(grid.tolist())) == pytest.approx([0, start + (1 - start) / 4, start + (1 - start) / 2, 0.75025])
    assert (grid == 0).double().mean().item() == pytest.approx(0.25)
    later = StartOrLater(0.3)(U, start)
    assert (later == 0).double().mean().item() == pytest.approx(0.7, abs=1e-4)
    rest = later[later > 0]
    assert rest.min() >= start
    assert rest.mean().item() == pytest.approx((1 + start) / 2, abs=1e-3)
    assert (StartOrLater(0.0)(U, start) == 0).all()
    assert (StartOrLater(1.0)(U, start) > 0).all()


def test_the_u_shaped_law_has_its_density():
    t, a = UShaped(4.0)(U, 0.0), 4.0
    edges = np.linspace(0, 1, 11)
    share, _ = np.histogram(t.numpy(), edges)
    density = lambda x: a / (np.exp(a) - 1) * (np.exp(a * x) + np.exp(a * (1 - x))) / 2  # noqa: E731
    fine = np.linspace(0, 1, 100_001)
    expected = [density(fine[(fine >= lo) & (fine <= hi)]).mean() * 0.1 for lo, hi in pairwise(edges)]
    assert share / len(t) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UShaped(0), "positive a"),
        (lambda: Grid(0), "method.steps"),
        (lambda: StartOrLater(1.5), "must lie in [0, 1]"),
    ],
)
def test_impossible_laws_are_refused(make, message):
    with pytest.raises(ValueError, match=r".") as error:
        make()
    assert message in str(error.value)

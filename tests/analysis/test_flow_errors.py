"""Drift and straightness against flows that are known exactly."""

import math

import pytest
import torch
from flow_chain_tools import MEAN, Constant, flow, gaussian_flow, mixture_flow
from scipy.integrate import quad

from closed_forms import Mixture, exact_solution
from stillhouse.analysis.flow_errors import (
    Estimate,
    mean_with_error,
    path_bending,
    sample_images,
    squared_distances,
    straightness,
)
from stillhouse.diffusion.flow import euler_path
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.metrics.distances import wasserstein_distance

SHAPE = (2, 1, 1)
SAMPLING = {"shape": SHAPE, "num_classes": 0, "device": "cpu"}
SEEDS = torch.arange(40)


def test_an_estimate_by_hand():
    found = mean_with_error(torch.tensor([1.0, 3.0, 5.0]))
    assert found.mean == 3
    assert found.error == pytest.approx(2 / math.sqrt(3))
    assert found.root == pytest.approx(math.sqrt(3))
    assert mean_with_error(torch.tensor([2.0])) == Estimate(2.0, None)


def test_the_drift_between_two_gaussian_flows():
    """X_1 = mean + std c with c the noise."""
    flows = [gaussian_flow(std=0.5), gaussian_flow((0.1, 0.2), std=0.3)]
    first, second = (sample_images(one.sample, SEEDS, batch_size=16, **SAMPLING) for one in flows)
    noise = sample_noise(SEEDS, SHAPE).double()
    away = torch.tensor([0.1 - MEAN[0], 0.2 - MEAN[1]])[:, None, None] + (0.3 - 0.5) * noise
    torch.testing.assert_close(squared_distances(first, second), away.square().flatten(1).sum(1), rtol=3e-3, atol=1e-4)


def test_a_gaussian_flow_is_as_bent_as_its_closed_form():
    """v = mean + g'(t) c with g = sqrt(t^2 std^2 + (1 - t)^2), so that S = d (int g'^2 dt - (std - 1)^2)."""
    std = 0.3

    def slope(t):
        return (t * std**2 - (1 - t)) / math.sqrt(t**2 * std**2 + (1 - t) ** 2)

    share = quad(lambda t: slope(t) ** 2, 0, 1)[0] - (std - 1) ** 2
    noise = sample_noise(SEEDS, SHAPE)
    expected = share * noise.double().square().flatten(1).sum(1)
    errors = []
    for steps in (50, 100, 200):
        found = path_bending(gaussian_flow(std=std), noise, None, steps)
        errors.append(((found - expected).abs().sum() / expected.sum()).item())
    assert errors[2] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)  # Euler's order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.3)


def test_a_straight_flow_has_no_bend_and_a_shorter_time_changes_nothing():
    noise = sample_noise(SEEDS, SHAPE)
    assert path_bending(flow(Constant()), noise, None, 7).abs().max() < 1e-12
    teacher = flow(Constant())
    teacher.schedule = lambda steps: torch.tensor([1.0, 0.0], dtype=torch.float64)  # from t = 1/2
    assert path_bending(teacher, noise, None, 7).abs().max() < 1e-12


@pytest.mark.parametrize("make", [gaussian_flow, mixture_flow])
def test_the_path_is_the_one_of_its_own_euler_solver(make):
    noise = sample_noise(SEEDS, SHAPE)
    teacher = make(solver="euler", steps=20)
    *_, (end, _) = euler_path(teacher, noise, None, 20)
    torch.testing.assert_close(end.float(), teacher.sample(noise), rtol=1e-5, atol=1e-5)


def test_the_path_is_the_flow_of_the_mixture():
    """Against scipy's solution, at t = 1/2 and 1."""
    noise = sample_noise(SEEDS, SHAPE)
    states = [z for z, _ in euler_path(mixture_flow(), noise, None, 800)]
    start = 1e-3
    x = noise.double() / start
    t = start + (1 - start) / 2
    halfway = t * exact_solution(x, (1 - start) / start, (1 - t) / t)
    torch.testing.assert_close(states[400], halfway, rtol=0, atol=3e-3)
    torch.testing.assert_close(states[800], exact_solution(x, (1 - start) / start, 1e-5), rtol=0, atol=3e-2)


def test_batches_change_nothing():
    teacher = mixture_flow(steps=8)
    whole = straightness(teacher, SEEDS, 10, batch_size=40, device="cpu")
    parts = straightness(teacher, SEEDS, 10, batch_size=7, device="cpu")
    assert parts.mean == pytest.approx(whole.mean, rel=1e-6)
    assert parts.error == pytest.approx(whole.error, rel=1e-6)
    images = [sample_images(teacher.sample, SEEDS, batch_size=size, **SAMPLING) for size in (40, 7)]
    torch.testing.assert_close(*images)


def test_labels_reach_a_conditional_flow_and_no_other():
    seen = []

    class Labelled(Constant):
        num_classes = 3

        def forward(self, z, noise_labels, class_labels=None, augment_labels=None):
            seen.append(class_labels)
            return super().forward(z, noise_labels)

    teacher = flow(Labelled())
    straightness(teacher, SEEDS, 1, batch_size=40, device="cpu")
    teacher.conditional = True
    straightness(teacher, SEEDS, 1, batch_size=40, device="cpu")
    assert seen[0] is None
    assert set(seen[1].tolist()) == {0, 1, 2}


def test_misuse():
    with pytest.raises(ValueError, match="have no pairs"):
        squared_distances(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample_images(lambda noise, labels: noise / 0, SEEDS, batch_size=9, **SAMPLING)


def test_wasserstein_by_hand_and_as_a_metric():
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert wasserstein_distance(points, points[torch.randperm(50)]) == 0
    assert wasserstein_distance(points, points + torch.tensor([3.0, 4.0])) == pytest.approx(5)
    line = torch.tensor([[0.0], [1.0]])
    assert wasserstein_distance(line, torch.tensor([[3.0], [1.0]])) == pytest.approx(math.sqrt(2.5))  # 0 to 1, 1 to 3
    with pytest.raises(ValueError, match="cannot be paired"):
        wasserstein_distance(points, points[:40])


def test_the_bound_holds_between_finite_sets():
    seeds = torch.arange(200)
    data = Mixture().sample(200, torch.Generator().manual_seed(0))
    first, second = (
        sample_images(one.sample, seeds, batch_size=200, **SAMPLING)
        for one in (mixture_flow(), gaussian_flow((0.2, 0.1), 0.3))
    )
    bound = wasserstein_distance(data, first) + mean_with_error(squared_distances(first, second)).root
    assert wasserstein_distance(data, second) <= bound
    assert wasserstein_distance(data, first) < wasserstein_distance(data, second)

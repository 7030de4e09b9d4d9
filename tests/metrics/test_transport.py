from itertools import permutations

import pytest
import torch

from stillhouse.metrics.distances import wasserstein_distance


def rows(count, dim=2, seed=0):
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_translation_costs_its_length():
    """Of all pairings of a set with its translate the translation itself is the best one."""
    points, shift = rows(300), torch.tensor([0.3, -0.4])
    mixed = (points.double() + shift.double())[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert wasserstein_distance(points, mixed) == pytest.approx(0.5, rel=1e-7)
    assert wasserstein_distance(points, points.flip(0)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_tiny_sets_match_all_permutations(seed):
    a, b = rows(6, 3, seed).double(), rows(6, 3, seed + 100).double()
    best = min((a - b[list(order)]).square().sum(1).mean() for order in permutations(range(6)))
    assert wasserstein_distance(a, b) == pytest.approx(best.sqrt().item(), rel=1e-12)


def test_on_a_line_the_sorted_points_are_paired():
    a, b = rows(200, 1).double(), rows(200, 1, 5).double() ** 3
    expected = (a.sort(0).values - b.sort(0).values).square().mean().sqrt()
    assert wasserstein_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_unequal_sets_are_refused():
    with pytest.raises(ValueError, match=r"sets \(4, 2\) and \(5, 2\) cannot be paired one to one"):
        wasserstein_distance(rows(4), rows(5))

"""Bezier curves against numpy, finite differences and scipy's Bernstein polynomials."""

from math import comb

import numpy as np
import pytest
import torch
from scipy.interpolate import BPoly

from stillhouse.diffusion import bezier
from stillhouse.diffusion.control_points import ControlPoints, check_weights, default_weights

T = torch.tensor([0.0, 0.125, 0.5, 0.7, 1.0], dtype=torch.float64)


def control(order, batch=5, shape=(2, 3, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(order)
    return torch.randn(batch, order + 1, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_points_and_derivatives_equal_scipys(order):
    points = control(order)
    for i, t in enumerate(T.tolist()):
        curve = BPoly(points[i].flatten(1).numpy()[:, None], [0, 1])
        assert bezier.point(points, T)[i].flatten().numpy() == pytest.approx(curve(t), abs=1e-12)
        assert bezier.derivative(points, T)[i].flatten().numpy() == pytest.approx(curve.derivative()(t), abs=1e-11)


def test_quadratic_and_cubic_forms_are_the_written_ones():
    x0, g, x1 = control(2).unbind(1)
    t = T[:, None, None, None]
    torch.testing.assert_close(bezier.point(control(2), T), (1 - t) ** 2 * x0 + 2 * t * (1 - t) * g + t**2 * x1)
    torch.testing.assert_close(bezier.derivative(control(2), T), 2 * ((1 - t) * (g - x0) + t * (x1 - g)))
    x0, g1, g2, x1 = control(3).unbind(1)
    cubic = (1 - t) ** 3 * x0 + 3 * (1 - t) ** 2 * t * g1 + 3 * (1 - t) * t**2 * g2 + t**3 * x1
    torch.testing.assert_close(bezier.point(control(3), T), cubic)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_the_derivative_is_that_of_the_points(order):
    points, h = control(order), 1e-6
    t = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    slope = (bezier.point(points, t + h) - bezier.point(points, t - h)) / (2 * h)
    torch.testing.assert_close(bezier.derivative(points, t), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_elevation_keeps_the_curve(order):
    points = control(order)
    raised = bezier.elevate(points)
    assert raised.shape[1] == order + 2
    torch.testing.assert_close(bezier.point(raised, T), bezier.point(points, T))
    torch.testing.assert_close(bezier.derivative(raised, T), bezier.derivative(points, T))


def test_an_elevated_line_has_its_points_at_equal_distances():
    line = control(1)
    raised = bezier.elevate(bezier.elevate(line))
    for i in range(4):
        torch.testing.assert_close(raised[:, i], line[:, 0] + i / 3 * (line[:, 1] - line[:, 0]))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_curve_passes_through_its_points(order):
    given = control(order)  # at t = k / n
    inner = torch.tensordot(given, bezier.through(order), ([1], [1])).movedim(-1, 1)
    curve = torch.cat([given[:, :1], inner, given[:, -1:]], 1)
    for k in range(order + 1):
        t = torch.full((5,), k / order, dtype=torch.float64)
        torch.testing.assert_close(bezier.point(curve, t), given[:, k])


def test_the_weights_of_points_are_those_of_the_closed_forms():
    assert bezier.through(2).numpy() == pytest.approx(np.array([[-0.5, 2, -0.5]]))
    assert bezier.through(3).numpy() * 6 == pytest.approx(np.array([[-5, 18, -9, 2], [2, -9, 18, -5]]))


def test_weights_of_samples_are_their_own_and_sum_to_one():
    table = bezier.bernstein(T, 4)
    assert table.shape == (5, 5)
    torch.testing.assert_close(table.sum(1), torch.ones_like(T))
    assert table[1, 2].item() == pytest.approx(comb(4, 2) * 0.875**2 * 0.125**2)
    points = control(4)
    whole = bezier.point(points, T)
    for i in range(5):
        torch.testing.assert_close(bezier.point(points[i : i + 1], T[i : i + 1])[0], whole[i])


# -- control points from teachers ----------------------------------------------------------------------------------


def paths(teachers, order, batch=64):
    """noise (B, C, H, W) and states X_t (B, m, K, C, H, W) at k/n, the last one the end."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(batch, 1, 2, 2, generator=generator, dtype=torch.float64)
    return noise, torch.randn(batch, teachers, order, 1, 2, 2, generator=generator, dtype=torch.float64)


def choice(batch=64):
    return (torch.arange(batch, dtype=torch.float64) + 0.5) / batch


def test_default_weights():
    assert default_weights(1, 1) == [[1]]
    assert default_weights(1, 2) == [[0.5, 0.5]]
    assert default_weights(2, 2) == [[1, 0], [0, 1]]
    assert default_weights(3, 3) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert default_weights(3, 2) == [[1, 0], [0, 1], [0, 1]]
    assert default_weights(2, 1) == [[1], [1]]
    with pytest.raises(ValueError, match="fewer than the 3 of method.teachers"):
        default_weights(2, 3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, 0.4], [0, 1]], "control point 1 are [0.5, 0.4]; they must not be negative, and sum to 1"),
        ([[1, 0], [-0.5, 1.5]], "control point 2"),
        ([[1, 0]], "must be 2 rows"),
        ([[1], [1]], "of 2 numbers"),
        ([1, 0], "must be 2 rows"),
        ("uniform", "must be 2 rows"),
    ],
)
def test_odd_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=r"method.weights") as error:
        check_weights("weights", weights, 2, 2)
    assert message in str(error.value)


def test_endpoint_slots_are_mixtures_of_the_ends():
    noise, states = paths(2, 3)
    weights = torch.tensor([[0.25, 0.75], [1, 0], [0, 1]], dtype=torch.float64)
    points = ControlPoints(3, ("endpoint", "endpoint"), "one_hot")(noise, states[:, :, -1:], weights, choice())
    first, second = states[:, 0, -1], states[:, 1, -1]
    for found, expected in zip(points.unbind(1), (noise, 0.25 * first + 0.75 * second, first, second), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_trajectory_slots_pass_through_the_teachers_path(order):
    noise, states = paths(1, order)
    control_points = ControlPoints(order, ("trajectory",) * (order - 1), "one_hot")
    assert control_points.times == [k / order for k in range(1, order)]
    at_levels = states / (torch.arange(1, order + 1).double() / order)[:, None, None, None]  # x = X_t / t
    points = control_points(noise, at_levels, torch.ones(order, 1, dtype=torch.float64), choice())
    for k in range(1, order + 1):
        at = torch.full((len(noise),), k / order, dtype=torch.float64)
        torch.testing.assert_close(bezier.point(points, at), states[:, 0, k - 1])


def test_trajectory_slots_of_two_teachers_mix_their_control_points():
    noise, states = paths(2, 2)
    weights = torch.tensor([[0.3, 0.7], [0, 1]], dtype=torch.float64)
    points = ControlPoints(2, ("trajectory",), "one_hot")(noise, states, weights, choice())
    own = [states[:, j, 0] - (noise + states[:, j, 1]) / 2 for j in range(2)]
    torch.testing.assert_close(points[:, 1], 0.3 * own[0] + 0.7 * own[1])


def test_linear_slots_are_the_elevated_line():
    noise, states = paths(2, 1)
    weights = torch.tensor([[1, 0], [1, 0], [0.5, 0.5]], dtype=torch.float64)
    control_points = ControlPoints(3, ("linear", "linear"), "average")
    assert control_points.times == []
    points = control_points(noise, states, weights, choice())
    line = torch.stack([noise, states.mean((1, 2))], 1)
    torch.testing.assert_close(points, bezier.elevate(bezier.elevate(line)))


def test_one_hot_ends_are_drawn_by_the_choice_alone():
    noise, states = paths(3, 1)
    weights = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    ends = ControlPoints(1, (), "one_hot")(noise, states, weights, choice())[:, -1]
    for i, expected in enumerate([0] * 16 + [1] * 32 + [2] * 16):
        torch.testing.assert_close(ends[i], states[i, expected, -1])
    average = ControlPoints(1, (), "average")(noise, states, weights, choice())[:, -1]
    torch.testing.assert_close(average, torch.einsum("j,bjchw->bchw", weights[0], states[:, :, -1]))


def test_shuffled_control_points_are_of_other_samples_and_ends_are_not():
    noise, states = paths(1, 1)
    weights = torch.ones(2, 1, dtype=torch.float64)
    straight = ControlPoints(2, ("endpoint",), "one_hot")(noise, states, weights, choice())
    shuffled = ControlPoints(2, ("endpoint",), "one_hot", shuffled=True)(noise, states, weights, choice())
    torch.testing.assert_close(shuffled[1:, 1], straight[:-1, 1])
    torch.testing.assert_close(shuffled[:, [0, 2]], straight[:, [0, 2]])

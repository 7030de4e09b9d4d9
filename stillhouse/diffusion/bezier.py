"""Bezier curves through images: B_t = sum_i C(n, i) (1 - t)^(n - i) t^i P_i with control points P_0 .. P_n, of order n.

Control points are one tensor (B, n + 1, ...), times t (B,) float64 in [0, 1], and every sample has its own curve and time.
"""

from math import comb

import torch
from torch import Tensor

from stillhouse.diffusion.flow import per_sample


def bernstein(t: Tensor, order: int) -> Tensor:
    """Evaluate Bernstein's polynomials C(n, i) (1 - t)^(n - i) t^i for i = 0 .. n: (B, n + 1), in the precision of t."""
    return torch.stack([comb(order, i) * (1 - t) ** (order - i) * t**i for i in range(order + 1)], dim=-1)


def _combine(weights: Tensor, points: Tensor) -> Tensor:
    return (weights.to(points.dtype).view(*weights.shape, *[1] * (points.ndim - 2)) * points).sum(1)


def point(control: Tensor, t: Tensor) -> Tensor:
    """Evaluate curves at their times: B_t (B, ...)."""
    return _combine(bernstein(t, control.shape[1] - 1), control)


def derivative(control: Tensor, t: Tensor) -> Tensor:
    """Differentiate curves: B'_t = n sum_i C(n - 1, i) (1 - t)^(n - 1 - i) t^i (P_{i+1} - P_i), (B, ...)."""
    order = control.shape[1] - 1
    return order * _combine(bernstein(t, order - 1), control.diff(dim=1))


def elevate(control: Tensor) -> Tensor:
    """Give the same curve one control point more (B, n + 2, ...): P'_i = i/(n+1) P_{i-1} + (1 - i/(n+1)) P_i."""
    order = control.shape[1]  # the new one
    share = torch.arange(1, order, dtype=torch.float64, device=control.device) / order
    before, after = control[:, :-1], control[:, 1:]
    inner = per_sample(share, before.transpose(0, 1)).transpose(0, 1) * (before - after) + after
    return torch.cat([control[:, :1], inner, control[:, -1:]], dim=1)


def through(order: int) -> Tensor:
    """Compute the weights by which n + 1 points of a curve, at t = k/n, give its inner control points.

    Returns:
        W (n - 1, n + 1), float64, with P_i = sum_k W[i - 1, k] (point at t = k/n). For n = 2, P_1 = 2 x_{1/2} - (x_0 + x_1) / 2.
    """
    table = bernstein(torch.arange(order + 1, dtype=torch.float64) / order, order)  # its row k gives the point at k/n
    return torch.linalg.inv(table)[1:-1]

"""Control points from several teachers: P_0 = x_0, then P_i = sum_j A_ij Q_i[Phi_j(x_0)], with a row of weights for each.

Teachers j = 1 .. m are flows that start from the same x_0; Phi_j(x_0) is the end of j's path. A has n rows, which sum to 1; the
last one weights the end points, the others the inner control points. The general definition is ours: the note that proposes
Bezier distillation (arXiv 2503.16562) has no formula for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.checks import check_choice
from stillhouse.diffusion import bezier

SLOTS = ("endpoint", "trajectory", "linear")
END_ROWS = ("one_hot", "average")
Matrix = Sequence[Sequence[float]]


def default_weights(order: int, teachers: int) -> list[list[float]]:
    """Choose weights: point i is teacher ceil(i m / n)'s; of a straight path, all end points alike.

    Args:
        order: n.
        teachers: m.

    Returns:
        The n rows of A, each of m numbers.

    Raises:
        ValueError: where there are more teachers than points.
    """
    if order == 1:
        return [[1 / teachers] * teachers]
    if teachers > order:
        raise ValueError(
            f"method.order={order} has {order} control points to weight, fewer than the {teachers} of method.teachers: raise the "
            "order, take fewer teachers, or give method.weights"
        )
    return [[float(j == -(-i * teachers // order)) for j in range(1, teachers + 1)] for i in range(1, order + 1)]


def check_weights(name: str, weights: Matrix, order: int, teachers: int) -> Tensor:
    """Check a matrix of weights.

    Args:
        name: of the option method.NAME, for messages.
        weights: rows of A.
        order: n.
        teachers: m.

    Returns:
        A (n, m), float64.

    Raises:
        ValueError: for another size, negative weights, or a row that does not sum to 1.
    """
    try:
        matrix = torch.tensor([[float(value) for value in row] for row in weights], dtype=torch.float64)
    except (TypeError, ValueError):
        matrix = torch.empty(0)
    if tuple(matrix.shape) != (order, teachers):
        raise ValueError(
            f"method.{name}={weights} must be {order} rows (method.order) of {teachers} numbers (method.teachers)"
        )
    for i, row in enumerate(matrix, 1):
        if (row < 0).any() or not torch.isclose(row.sum(), torch.ones((), dtype=row.dtype), atol=1e-6):
            raise ValueError(
                f"method.{name}: the weights of control point {i} are {row.tolist()}; they must not be negative, and sum to 1"
            )
    return matrix


def check_slots(slot: str | Sequence[str], order: int) -> list[str]:
    """Give each of the order - 1 inner control points its slot.

    Args:
        slot: one name of `SLOTS` for all, or one for each.
        order: n.

    Raises:
        ValueError: for an unknown name, or another number of them.
    """
    several = isinstance(slot, Sequence) and not isinstance(slot, str)
    if several and len(slot) != order - 1:
        raise ValueError(
            f"method.slot={list(slot)} must be one name, or one for each of the {order - 1} inner control points of "
            f"method.order={order}"
        )
    slots = list(slot) if several else [slot] * (order - 1)
    for name in slots if several else [slot]:
        check_choice("method.slot", name, SLOTS)
    return slots


class ControlPoints(nn.Module):
    """Control points of curves from noise to images, by what several teachers make of the noise.

    Args:
        order: n.
        slots: what Q_i is, for each inner point i = 1 .. n - 1. "endpoint": Phi_j(x_0). "trajectory": the control point whose
            curve passes through j's path at k/n for k = 1 .. n - 1, if all are of it. "linear": on the straight line from x_0
            to P_n.
        end_row: "one_hot", the end point of one teacher, chosen once for each sample by the last row; "average", their mean.
        shuffled: whether every inner point is taken from another sample (a control, which shows what the pairing is worth).
    """

    def __init__(self, order: int, slots: Sequence[str], end_row: str, shuffled: bool = False):
        super().__init__()
        self.order, self.slots, self.end_row, self.shuffled = order, tuple(slots), end_row, shuffled
        self.register_buffer("through", bezier.through(order), persistent=False)
        self.register_buffer("path_times", torch.tensor([*self.times, 1.0]), persistent=False)

    @property
    def times(self) -> list[float]:
        """Times at which the teachers' paths are needed, ascending."""
        inner = [k / self.order for k in range(1, self.order)]
        return inner if "trajectory" in self.slots else []

    def forward(self, noise: Tensor, states: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
        """Compute the control points.

        Args:
            noise: x_0 (B, C, H, W).
            states: the teachers' x = X_t / t at `times`, then their end points (B, m, K, C, H, W).
            weights: A (n, m).
            choice: uniform numbers in (0, 1), (B,), which choose the end point.

        Returns:
            P_0 .. P_n (B, n + 1, C, H, W).
        """
        weights = weights.to(states.dtype)
        ends, points = states[:, :, -1], [noise]
        end = self._end(ends, weights[-1], choice)
        if self.times:
            paths = self.path_times.to(states.dtype)[:, None, None, None] * states  # X_t
            start = noise[:, None, None].expand(-1, paths.shape[1], 1, *noise.shape[1:])
            # (B, m, n - 1, C, H, W): for each teacher all inner control points of the curve through its path
            passing = torch.tensordot(self.through.to(paths.dtype), torch.cat([start, paths], 2), ([1], [2]))
            passing = passing.movedim(0, 2)
        for i, slot in enumerate(self.slots, 1):
            if slot == "linear":
                inner = noise + (i / self.order) * (end - noise)
            else:
                source = ends if slot == "endpoint" else passing[:, :, i - 1]
                inner = torch.tensordot(source, weights[i - 1], ([1], [0]))
            points.append(inner.roll(1, 0) if self.shuffled else inner)
        return torch.stack([*points, end], dim=1)

    def _end(self, ends: Tensor, row: Tensor, choice: Tensor) -> Tensor:
        if self.end_row == "average":
            return torch.tensordot(ends, row, ([1], [0]))
        # Of x_0 alone and not anew at each visit: a student of random targets would learn their mean.
        teacher = (choice[:, None] > row.cumsum(0)[:-1]).sum(1)
        return ends[torch.arange(len(ends), device=ends.device), teacher]

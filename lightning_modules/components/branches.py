"""Branches of the output that learn all of the teacher's states inside a student step (B-DENSE, arXiv 2602.15971)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.components.method import Method
from stillhouse.checks import check_counts
from stillhouse.networks.branching import plain_state, widen

_RATIO = 0.3  # of geometric weights: the end point has about 0.7 of their sum
FAMILIES = {
    "end": lambda k, count: float(k == count),
    "uniform": lambda k, count: 1.0,
    "linear": lambda k, count: float(k),
    "geometric": lambda k, count: _RATIO ** (count - k),
}


class BranchedMethod(Method):
    """A method whose student step spans several steps of its teacher, and that may learn the states on the way as well.

    The student's output has K groups of channels, ordered by decreasing noise; the last one, the end point, is the method's
    and alone is sampled and exported. The loss is sum_k w_k L_k over the branches, where L_K is that of the method without
    branches. One branch is that method, bit for bit.

    Args:
        branches: K, which divides the teacher's steps inside a student step.
        branch_weights: The w_k but for a factor, one of FAMILIES or K numbers.
        branch_auxiliary: None, for weights that sum to 1; or the sum of all but the end point's, whose weight is then 1, so
            that it pulls as without branches.
        branch_fade: None, or the share of the training (in progressive distillation, of a round) over which the auxiliary
            weights fall to zero, linearly; where weights sum to 1 the end point's grows by as much.
        common: Of all methods.

    Raises:
        ValueError: For a value out of range.
    """

    substeps: int  # teacher steps inside a student step

    def __init__(
        self,
        *,
        branches: int = 1,
        branch_weights: str | Sequence[float] = "uniform",
        branch_auxiliary: float | None = None,
        branch_fade: float | None = None,
        **common,
    ):
        super().__init__(**common)
        check_counts(**{"method.branches": branches})
        if branch_fade is not None and not 0 < branch_fade <= 1:
            raise ValueError(f"method.branch_fade must lie in (0, 1], or be null, got {branch_fade!r}")
        *auxiliary, _ = weights_of_branches(branch_weights, branches, branch_auxiliary)
        self.branches = branches
        self.weights_sum_to_one, self.fade = branch_auxiliary is None, branch_fade
        self.sum_of_auxiliary_weights = sum(auxiliary)
        self.register_buffer("auxiliary_weights", torch.tensor(auxiliary), persistent=False)

    def widen_student(self, substeps: int) -> None:
        """Give the student its branches, for steps that span `substeps` of the teacher's.

        Raises:
            ValueError: For branches that do not divide them.
        """
        if substeps % self.branches:
            raise ValueError(
                f"method.branches={self.branches} does not divide the {substeps} teacher steps inside a student step; change "
                "one of them"
            )
        self.substeps = substeps
        widen(self.student.network, self.branches)

    @property
    def stride(self) -> int:
        """Every so many teacher steps their state is a target; the last one is the end point."""
        return self.substeps // self.branches

    def branch_loss(self, losses: Tensor) -> Tensor:
        """The training loss, a scalar, of those (B, K) of every sample and branch."""
        means = losses.mean(0)
        if self.branches == 1:
            return means[0]
        for k, loss in enumerate(means.detach(), 1):
            self.log_mean(f"loss/branch{k}", loss)
        left = max(0.0, 1 - self.progress / self.fade) if self.fade else 1.0
        end = 1 - left * self.sum_of_auxiliary_weights if self.weights_sum_to_one else 1.0
        return end * means[-1] + left * (self.auxiliary_weights * means[:-1]).sum()

    def exported(self) -> dict[str, Tensor]:
        """Without branches."""
        return plain_state(self.student.network)


def weights_of_branches(weights: str | Sequence[float], branches: int, auxiliary: float | None) -> list[float]:
    """w_1 .. w_K as `BranchedMethod` describes them.

    Raises:
        ValueError: For weights that are no such numbers.
    """
    if isinstance(weights, str):
        if weights not in FAMILIES:
            raise ValueError(
                f"method.branch_weights={weights!r} is unknown; choose {', '.join(FAMILIES)} or {branches} numbers"
            )
        values = [FAMILIES[weights](k, branches) for k in range(1, branches + 1)]
    else:
        values = [float(value) for value in weights]
    if len(values) != branches or min(values) < 0 or values[-1] <= 0:
        raise ValueError(
            f"method.branch_weights={weights} must be {branches} numbers for method.branches={branches}, none of them negative, "
            "the last one positive"
        )
    if auxiliary is None:
        return [value / sum(values) for value in values]
    others = sum(values[:-1])
    if auxiliary < 0 or (auxiliary and branches > 1 and not others):
        raise ValueError(
            f"method.branch_auxiliary={auxiliary!r} must be null or not negative, and needs method.branch_weights={weights} with "
            "others than the end point's"
        )
    return [auxiliary * value / others if others else 0.0 for value in values[:-1]] + [1.0]

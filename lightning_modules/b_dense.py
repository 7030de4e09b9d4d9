"""B-DENSE: branches that learn all of the teacher's states inside a student step (arXiv 2602.15971).

A mix-in for methods on `DenseTargets`: the student's output is widened to K groups of channels, one for each of K states of the
teacher, and only the last group, the end point, is ever sampled. `BDenseSFD` and `BDenseProgressive` are the paper's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.denoising_student import DenoisingStudent
from lightning_modules.progressive import ProgressiveDistillation
from lightning_modules.sfd import SFD
from stillhouse.checks import check_counts
from stillhouse.networks.branching import widen

_RATIO = 0.3  # of geometric weights: the end point has about 0.7 of their sum
FAMILIES = {
    "end": lambda k, count: float(k == count),
    "uniform": lambda k, count: 1.0,
    "linear": lambda k, count: float(k),
    "geometric": lambda k, count: _RATIO ** (count - k),
}


class BDense:
    """The loss is sum_k w_k L_k over the branches k = 1 .. K, ordered by decreasing noise, where L_K is the host's loss.

    branches: K, which divides the teacher's steps inside a student step; 1 is the host, bit for bit.
    weights: the w_k but for a factor, one of FAMILIES or K numbers.
    auxiliary: None, for weights that sum to 1; or the sum of all but the end point's, whose weight is then 1, so that it pulls
    as in the host. fade: None, or the share of the training (in progressive distillation, of a round) over which the
    auxiliary weights fall to zero, linearly; where weights sum to 1 the end point's grows by as much.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        branches: int,
        weights: str | Sequence[float] = "uniform",
        auxiliary: float | None = None,
        fade: float | None = None,
        **host: Any,
    ):
        check_counts(**{"method.branches": branches})
        self.branches = branches  # which the host reads
        super().__init__(teacher, **host)
        if fade is not None and not 0 < fade <= 1:
            raise ValueError(f"method.fade must lie in (0, 1], or be null, got {fade!r}")
        values = branch_weights(weights, branches, auxiliary)
        self.normalised, self.fade = auxiliary is None, fade
        self.register_buffer("auxiliaries", torch.tensor(values[:-1]), persistent=False)
        self.sum_of_auxiliaries = sum(values[:-1])
        widen(self.student.network, branches)

    def total(self, losses: Tensor) -> Tensor:
        for k, loss in enumerate(losses.detach(), 1):
            self.log_mean(f"loss/branch{k}", loss)
        left = max(0.0, 1 - self.progress / self.fade) if self.fade else 1.0
        end = 1 - left * self.sum_of_auxiliaries if self.normalised else 1.0
        return end * losses[-1] + left * (self.auxiliaries * losses[:-1]).sum()


class BDenseSFD(BDense, SFD):
    """On SFD, with the states between the student's times."""


class BDenseProgressive(BDense, ProgressiveDistillation):
    """On progressive distillation.

    With two branches the first one's target is the teacher's own estimate, which the student starts with: a regulariser,
    no news. With `factor` = 4 and four branches the ones between carry information.
    """


class BDenseStudent(BDense, DenoisingStudent):
    """On Denoising Student, whose one step spans the teacher's whole path; ours, not the paper's."""


def branch_weights(weights: str | Sequence[float], branches: int, auxiliary: float | None) -> list[float]:
    """w_1 .. w_K as `BDense` describes them. Errors: ValueError for odd ones."""
    if isinstance(weights, str):
        if weights not in FAMILIES:
            raise ValueError(
                f"method.weights={weights!r} is unknown; choose {', '.join(FAMILIES)} or {branches} numbers"
            )
        values = [FAMILIES[weights](k, branches) for k in range(1, branches + 1)]
    else:
        values = [float(value) for value in weights]
    if len(values) != branches or min(values) < 0 or values[-1] <= 0:
        raise ValueError(
            f"method.weights={weights} must be {branches} numbers for method.branches={branches}, none of them negative, the "
            "last one positive"
        )
    if auxiliary is None:
        return [value / sum(values) for value in values]
    others = sum(values[:-1])
    if auxiliary < 0 or (auxiliary and branches > 1 and not others):
        raise ValueError(
            f"method.auxiliary={auxiliary!r} must be null or not negative, and needs method.weights={weights} with others than "
            "the end point's"
        )
    return [auxiliary * value / others if others else 0.0 for value in values[:-1]] + [1.0]

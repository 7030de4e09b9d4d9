"""What a method needs to learn several states of its teacher's path at once."""

from torch import Tensor

from lightning_modules.components.method import Method
from stillhouse.networks.branching import plain_state


class DenseTargets(Method):
    """A method whose student step spans `substeps` steps of its teacher, and that compares `branches` states in it.

    Its losses have shape (B, K), one for each state after substeps / K, 2 substeps / K, .. substeps teacher steps. K is 1,
    the end point alone, unless B-DENSE (`lightning_modules/b_dense.py`) has widened the student.
    """

    branches = 1
    substeps: int

    def span(self, substeps: int) -> None:
        """Set `substeps`. Errors: ValueError for branches that do not divide them."""
        if substeps % self.branches:
            raise ValueError(
                f"method.branches={self.branches} does not divide the {substeps} teacher steps inside a student step; change "
                "one of them"
            )
        self.substeps = substeps

    @property
    def stride(self) -> int:
        """Every so many teacher steps their state is a target; the last one is the end point."""
        return self.substeps // self.branches

    def exported(self) -> dict[str, Tensor]:
        """Without branches."""
        return plain_state(self.student.network)

    def objective(self, losses: Tensor) -> Tensor:
        """The training loss, a scalar, of the losses (B, K)."""
        return self.total(losses.mean(0))

    def total(self, losses: Tensor) -> Tensor:
        """The same of the branches' mean losses (K,)."""
        return losses[-1]

"""Distillation of a flow in k steps (rectified flow, Liu et al., arXiv 2209.03003, section 2.3)."""

from typing import Any

from torch import Tensor

from lightning_modules.components.flow_student import PairedFlow
from stillhouse.checks import check_counts
from stillhouse.diffusion.distance import Distance
from stillhouse.diffusion.losses import REGRESSIONS
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.time_distributions import Grid


class FlowDistillation(PairedFlow):
    """min_v E d(X_0 + v(X_0, 0), X_1) on the pairs X_1 = Phi(X_0) that the teacher's ODE makes.

    In `steps` = k > 1 steps: min_v E d(v(X_t, t), X_1 - X_0), with X_t = (1 - t) X_0 + t X_1 and t in {0, 1/k, .. 1 - 1/k}; a
    sample is k Euler steps.

    Args:
        teacher: The flow, which the student begins as.
        steps: k, the network evaluations of a sample.
        loss: d, "l2", "l1" or "huber" (sums over pixels), or for one step "lpips" or "lpips+l2"
            (`stillhouse.diffusion.distance`), with `lpips_weights` and `lpips_resize` as there.
        options: Of `PairedFlow`.

    Raises:
        ValueError: For a loss that does not fit the steps.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        steps: int = 1,
        loss: str = "l2",
        lpips_weights: str | None = None,
        lpips_resize: int | None = None,
        **options,
    ):
        super().__init__([teacher], **options)
        check_counts(**{"method.steps": steps})
        if steps > 1 and loss not in REGRESSIONS:
            raise ValueError(
                f"method.loss={loss!r} compares images, which method.steps={steps} does not; choose l2 or steps=1"
            )
        self.euler_steps = steps
        self.times = Grid(steps)
        self.distance = Distance(loss, self.image_shape, lpips_weights, lpips_resize)

    def frozen_networks(self) -> list[Any]:
        return [*super().frozen_networks(), self.distance]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        noise, images = batch["noise"], batch["states"][:, -1]
        if self.euler_steps == 1:
            pair = self.predict(noise, self.time(self.times, batch), batch.get("label")), images
        else:
            pair = self.straight(noise, images, self.times, batch)
        loss = self.distance(*pair).mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log_held_out(self.distance(self.sample(batch["noise"], batch.get("label")), batch["states"][:, -1]))

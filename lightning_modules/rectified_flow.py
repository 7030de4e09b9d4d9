"""Rectified flow and reflow (Liu et al., arXiv 2209.03003)."""

import pytorch_lightning as pl
from torch import Tensor

from datamodules.components.augmentation import augmented, check_augment, check_unmirrored
from lightning_modules.components.flow_student import FlowStudent, PairedFlow
from stillhouse.checks import check_choice
from stillhouse.diffusion.losses import REGRESSIONS, regression
from stillhouse.diffusion.random_numbers import TrainingStream, position_noise
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.time_distributions import TimeDistribution


class RectifiedFlow(FlowStudent):
    """min_v E |X_1 - X_0 - v(X_t, t)|^2 / 2 with X_t = (1 - t) X_0 + t X_1, for independent noise X_0 and images X_1.

    One step is one batch of images, each at one time.

    Args:
        teacher: Names the network, and the schedule and solver by which the flow is sampled.
        times: Distribution of t.
        loss: "l2", "l1" or "huber", a sum over pixels.
        augment: As of `Pretrain`.
        common: Of `Method`.

    Raises:
        ValueError: For an unknown loss, or a network that takes no augmentation labels.
    """

    def __init__(
        self, teacher: Teacher, *, times: TimeDistribution, loss: str = "l2", augment: float | None = None, **common
    ):
        super().__init__(**common)
        check_choice("method.loss", loss, REGRESSIONS)
        check_augment(augment, teacher.denoiser.network)
        self.follow(teacher, label_dropout=True)
        self.times, self.regression_loss, self.augment = times, loss, augment

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        check_unmirrored(self.augment, data)
        return super().training_data(data)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return augmented(batch, self.augment, self.seed)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images = batch["image"]
        noise = position_noise(self.seed, batch["position"], self.image_shape, TrainingStream.NORMALS)
        loss = regression(*self.straight(noise, images, self.times, batch), self.regression_loss).mean()
        self.log_mean("loss/student", loss.detach())
        return loss


class Reflow(PairedFlow):
    """The same for the coupling that a flow makes: X_0 and what its ODE makes of it, X_1 = Phi(X_0). It straightens the flow.

    Args:
        teacher: The flow before, k - 1, which the k-th begins as.
        times: Distribution of t.
        loss: As of `RectifiedFlow`.
        options: Of `PairedFlow`.

    Raises:
        ValueError: For an unknown loss.
    """

    def __init__(self, teacher: Teacher, *, times: TimeDistribution, loss: str = "l2", **options):
        super().__init__([teacher], **options)
        check_choice("method.loss", loss, REGRESSIONS)
        self.times, self.regression_loss = times, loss

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,), of each stored sample."""
        noise, images = batch["noise"], batch["states"][:, -1]
        return regression(*self.straight(noise, images, self.times, batch), self.regression_loss)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.losses(batch).mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log_held_out(self.losses(batch))

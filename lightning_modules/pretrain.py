"""Training a teacher: denoising score matching as in EDM (arXiv 2206.00364, section 5)."""

import pytorch_lightning as pl
from torch import Tensor

from datamodules.components.augmentation import augmented, check_augment, check_unmirrored
from lightning_modules.components.method import Method, check_nfe
from stillhouse.diffusion.losses import denoising_score_matching, log_normal_sigmas
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.teacher import Teacher


class Pretrain(Method):
    """Trains the network of a teacher config from scratch, or on from its weights.

    One step is one batch of images, each at one noise level.

    Args:
        teacher: Names the network, and the schedule and solver that sample it.
        p_mean: Of ln(sigma) ~ N(p_mean, p_std^2).
        p_std: Likewise.
        augment: The probability of each of EDM's augmentations, whose labels the network gets; None: no augmentation.
        common: Of `Method`.

    Raises:
        ValueError: For options out of range, or a network that takes no augmentation labels.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        augment: float | None = None,
        **common,
    ):
        super().__init__(**common)
        if p_std <= 0:
            raise ValueError(f"method.p_std must be positive, got {p_std!r}")
        check_augment(augment, teacher.denoiser.network)
        self.sampler = teacher  # its schedule and solver draw the samples
        self.student = teacher.student().train()
        self.p_mean, self.p_std, self.augment = p_mean, p_std, augment

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        check_unmirrored(self.augment, data)
        return super().training_data(data)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = augmented(batch, self.augment, self.seed)
        images = batch["image"]
        sigma = log_normal_sigmas(len(images), self.p_mean, self.p_std, images.device)
        return {**batch, "sigma": sigma, "noise": images.new_empty(images.shape).normal_()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.get("label"), batch.get("augment")
        losses = denoising_score_matching(self.student, batch["image"], batch["sigma"], batch["noise"], *labels)
        loss = losses.mean()
        self.log_mean("loss/student", loss.detach())
        return loss

    def sampling(self, nfe: int | None = None) -> Sampling:
        check_nfe(nfe, self.sampler.nfe())
        return self.sampler.sampling()

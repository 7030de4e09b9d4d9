"""Training a teacher: denoising score matching as in EDM (arXiv 2206.00364, section 5) and EDM2 (arXiv 2312.02696)."""

import pytorch_lightning as pl
from torch import Tensor, nn

from datamodules.components.augmentation import augmented, check_augment, check_unmirrored
from lightning_modules.components.method import Method, check_nfe
from stillhouse.diffusion.losses import denoising_score_matching, log_normal_sigmas
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks.log_variance import LogVariance


class Pretrain(Method):
    """Trains the network of a teacher config from scratch, or on from its weights.

    One step is one batch of images, each at one noise level.

    Args:
        teacher: Names the network, and the schedule and solver that sample it.
        p_mean: Of ln(sigma) ~ N(p_mean, p_std^2).
        p_std: Likewise.
        augment: The probability of each of EDM's augmentations, whose labels the network gets; None: no augmentation.
        log_variance: Whether the loss l of a noise level is weighed as exp(-u) l + u with a learned u(sigma), as EDM2's is
            (equation 21), so that all levels count alike.
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
        log_variance: bool = False,
        **common,
    ):
        super().__init__(**common)
        if p_std <= 0:
            raise ValueError(f"method.p_std must be positive, got {p_std!r}")
        check_augment(augment, teacher.denoiser.network)
        self.sampler = teacher  # its schedule and solver draw the samples
        self.student = teacher.student().train()
        self.p_mean, self.p_std, self.augment = p_mean, p_std, augment
        self.log_variance = LogVariance() if log_variance else None
        if self.log_variance is not None:
            self.update_cycle = (("student", "log_variance"),)

    def trained_networks(self) -> dict[str, nn.Module]:
        return super().trained_networks() | ({"log_variance": self.log_variance} if self.log_variance else {})

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
        if self.log_variance is None:
            return loss
        u = self.log_variance(batch["sigma"])
        return ((-u).exp() * losses / batch["image"][0].numel() + u).mean()

    def sampling(self, nfe: int | None = None) -> Sampling:
        check_nfe(nfe, self.sampler.nfe())
        return self.sampler.sampling()

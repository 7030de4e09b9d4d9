"""DMD2: distribution matching distillation in one step or several (Yin et al., arXiv 2405.14867), also by f-divergences."""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.components.method import check_nfe
from lightning_modules.components.optimisation import Batch
from lightning_modules.diff_instruct import DiffInstruct
from stillhouse.checks import check_choice, check_counts, check_fractions
from stillhouse.diffusion.losses import DIVERGENCES, divergence_weights
from stillhouse.diffusion.sampling import Sampling, one_step_sampling
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.solvers import renoising
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise

INPUTS = ("simulated", "noised")
BINS = 10  # of equal width, over the teacher's noise levels, in which the mean density ratio is kept


class DMD2(DiffInstruct):
    """Diff-Instruct with DMD's weighting, several updates of fake score and classifier for each of the generator, and k steps:

        x_1 = s_1 z,   y_i = G(x_i, s_i),   x_{i+1} = y_i + s_{i+1} e_i,   at levels s_1 = sigma_init > .. > s_k.

    The images y_i of all steps are pulled to the teacher's distribution: a training sample is one step, chosen uniformly, and
    fake score and classifier see such samples. Its input x_i is

    - "simulated": what sampling gives, by the student as it is and without a gradient (section 4.5 of the paper);
    - "noised": a real image with noise of that level; at the first level pure noise, with which sampling begins.

    With k = 1 it is Diff-Instruct with the same options, bit for bit.

    `divergence` makes it f-distill (Xu et al., arXiv 2502.15681): the gradient of each sample is weighed by h(r) of the ratio r
    of the densities of real and generated images at the noised sample, exp(logit) of the classifier; see `divergence_weights`.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        steps: int = 1,
        inputs: str = "simulated",
        levels: Sequence[float] | None = None,
        divergence: str = "reverse_kl",
        ratio_ema: float = 0.0,
        weighting: str = "dmd",
        fake_updates: int = 5,
        **options: Any,
    ):
        """Args beside those of `DiffInstruct`.

        Args:
            teacher: As of `DiffInstruct`.
            steps: k, the most steps of a sample.
            inputs: Of the steps after the first one, "simulated" or "noised", which needs images.
            levels: The noise levels of these steps, descending from below sigma_init; None: of Karras' spacing (EDM, equation 5),
                as a grid of k intervals from sigma_init to the teacher's lowest level has them.
            divergence: Of `DIVERGENCES`; "reverse_kl" weighs all samples alike, others need `gan`.
            ratio_ema: How much of the mean density ratio of earlier updates stays, in [0, 1).
            weighting: As of `DiffInstruct`.
            fake_updates: As of `DiffInstruct`.

        Raises:
            ValueError: For options out of range or that exclude each other.
        """
        check_counts(**{"method.steps": steps})
        check_choice("method.inputs", inputs, INPUTS)
        check_choice("method.divergence", divergence, tuple(DIVERGENCES))
        check_fractions(**{"method.ratio_ema": ratio_ema})
        super().__init__(teacher, weighting=weighting, fake_updates=fake_updates, **options)
        if steps > 1 and self.nodes:
            raise ValueError(
                f"method.nodes={self.nodes}: the degradation path is that of a generator of one step, not of "
                f"method.steps={steps}: set one of the two to its default (nodes 0, steps 1)"
            )
        if steps > 1 and inputs == "noised" and teacher.num_classes and self.labels == "uniform":
            raise ValueError("method.inputs=noised takes images with their labels: set method.labels=data")
        if divergence != "reverse_kl" and not self.gan:
            raise ValueError(
                f"method.divergence={divergence} takes its density ratio from the classifier: set method.gan, as in "
                "conf/method/dmd2.yaml, or method.divergence=reverse_kl"
            )
        self.steps, self.inputs = steps, inputs
        self.lowest, self.highest = teacher.level_range
        self.levels = check_levels(levels, steps, self.sigma_init, self.lowest)
        self.divergence, self.ratio_ema = divergence, ratio_ema
        self.ratio_means = torch.ones(BINS, dtype=torch.float64)

    @property
    def evaluations(self) -> dict[str, float]:
        counts = super().evaluations
        simulated = float(self.steps - 1 if self.inputs == "simulated" else 0)
        if self.divergence != "reverse_kl":  # in the generator's updates
            share = 1 / len(self.update_cycle)
            counts["fake score's encoder"] += share
            simulated += share * (1 + simulated)
        return counts | ({"student without gradient": simulated} if simulated else {})

    def training_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        chosen = super().training_data(data)
        return data if self.steps > 1 and self.inputs == "noised" else chosen

    def sampling(self, nfe: int | None = None) -> Sampling:
        """The first `nfe` of its k steps: each of them ends with images that are trained to be the teacher's."""
        nfe = check_nfe(nfe, *range(self.steps, 0, -1))
        first = one_step_sampling(self.student, self.sigma_init)
        return first if nfe == 1 else Sampling([*self.levels[:nfe], 0.0], first.scale, "renoising", double=False)

    # -- its steps -------------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> Tensor:
        if self.steps == 1:
            return super().generate(batch, noise, labels)
        with torch.no_grad():
            x, sigma = self.student_input(batch, noise, labels)
        return self.student(x, sigma, labels)

    def student_input(self, batch: Batch, noise: TrainingNoise, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states x_i (B, C, H, W) of training samples, each at its own step, and their noise levels (B,)."""
        start = noise.latents * self.sampling(1).scale
        if self.inputs == "simulated":
            later = renoising(self.student, start, torch.tensor(self.levels, dtype=torch.float64), labels)
        else:
            later = (batch["image"] + level * noise.latents for level in self.levels[1:])
        step = noise.step(self.steps)
        x, sigma = start, torch.full_like(start[:, 0, 0, 0], self.sigma_init)
        for i, (level, state) in enumerate(zip(self.levels, chain([start], later), strict=True)):
            x = torch.where((step == i)[:, None, None, None], state, x)
            sigma = torch.where(step == i, level, sigma)
        return x, sigma

    # -- its divergence --------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Batch:
        """With the weights of the divergence (B,), which depend on all samples of the batch, in a generator update."""
        if self.divergence == "reverse_kl" or self.updating != ("student",):
            return batch
        with torch.no_grad():
            logits = torch.cat([self.logits(part) for part in self.micro_batches(batch)])
        sigma = self.noise_and_labels(batch)[0].sigma(self.generator_sigmas)
        bins = (BINS * (sigma - self.lowest) / (self.highest - self.lowest)).long().clamp(0, BINS - 1)
        weights, self.ratio_means = divergence_weights(logits, bins, self.ratio_means, self.divergence, self.ratio_ema)
        self.means["_divergence/square"] = weights.square().mean()
        return batch | {"divergence_weight": weights}

    def logits(self, batch: Batch) -> Tensor:
        """The classifier's (B,) of the noised images that the scores are compared at."""
        noise, labels = self.noise_and_labels(batch)
        images, sigma = self.generate(batch, noise, labels), noise.sigma(self.generator_sigmas)
        return self.gan.logits(self.fake_score, images, sigma, noise.noise, labels).squeeze(1)

    def matching_gradient(self, batch: Batch, images: Tensor, fake: Tensor, target: Tensor) -> Tensor:
        gradient = super().matching_gradient(batch, images, fake, target)
        if "divergence_weight" in batch:
            gradient *= batch["divergence_weight"][:, None, None, None]
        return gradient

    def metrics(self, means: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
        logged = super().metrics(means)
        if "_divergence/square" in means:
            # The share of as many equally weighted samples as have this variance: 1 for equal weights.
            logged["divergence/effective_share"] = 1 / means["_divergence/square"]
        return logged

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.ratio_means = self.ratio_means.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ratio_means"] = self.ratio_means.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ratio_means = checkpoint["ratio_means"]


def check_levels(levels: Sequence[float] | None, steps: int, highest: float, lowest: float) -> list[float]:
    """The noise levels of all steps, given `method.levels`.

    Raises:
        ValueError: For levels of another number, or that do not descend from below the highest one to above zero.
    """
    if levels is None:
        return [highest, *karras_grid(steps, lowest, highest)[1:-1].tolist()]
    path = [highest, *map(float, levels), 0.0]
    if len(levels) != steps - 1 or not all(a > b for a, b in pairwise(path)):
        raise ValueError(
            f"method.levels must be the {steps - 1} noise levels of the steps after the first one, descending from below "
            f"method.sigma_init={highest:g}, got {list(levels)!r}; null: Karras' spacing"
        )
    return path[:-1]

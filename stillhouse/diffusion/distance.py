"""What a distillation calls d(output, target): a choice of pixels' and perceptual distances."""

from pathlib import Path

import torch
from torch import Tensor

from stillhouse.checkpoints.lpips import load_lpips
from stillhouse.checks import check_choice
from stillhouse.diffusion.losses import REGRESSIONS, regression
from stillhouse.networks.lpips import LPIPS, check_lpips_shape

DISTANCES = ("l2", "l1", "huber", "lpips", "lpips+l2")


class Distance:
    """d(output, target) of a student's images to their targets.

    "l2", "l1", "huber": `regression`, sums over pixels. "lpips": `LPIPS`. "lpips+l2": LPIPS plus the mean square of the
    difference over pixels (rectified flow's released code, arXiv 2209.03003, whose CIFAR-10 distillation is by "lpips").

    It is deliberately no nn.Module and copies to itself: held by a LightningModule, LPIPS' weights stay out of checkpoints,
    averages, optimisers and DDP buckets. Move it with `to`.

    shape: (C, H, W) of the images. lpips_weights, lpips_resize: of `LPIPS`, unused by the others.
    Errors: ValueError for an unknown loss or images that LPIPS doesn't take, and those of `LPIPS` for its weights.
    """

    def __init__(
        self,
        loss: str,
        shape: tuple[int, int, int],
        lpips_weights: str | Path | None = None,
        lpips_resize: int | None = None,
    ):
        check_choice("method.loss", loss, DISTANCES)
        self.loss = loss
        self._lpips: LPIPS | None = None
        if loss not in REGRESSIONS:
            check_lpips_shape(shape)
            self._lpips = load_lpips(lpips_weights, lpips_resize)

    def __deepcopy__(self, memo: dict) -> "Distance":
        return self

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """(B,), float32, of images (B, C, H, W) in about [-1, 1]; differentiable in both."""
        if self._lpips is None:
            return regression(output, target, self.loss)
        distance = self._lpips(output, target)
        if self.loss == "lpips+l2":
            distance = distance + (output.float() - target.float()).square().flatten(1).mean(1)
        return distance

    def to(self, device: torch.device | str) -> "Distance":
        if self._lpips is not None:
            self._lpips.to(device)
        return self

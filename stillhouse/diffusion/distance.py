"""Distances d(output, target) of distillation: over pixels, perceptual, or both."""

from pathlib import Path

import torch
from torch import Tensor

from stillhouse.checkpoints.lpips import load_lpips
from stillhouse.checks import check_choice
from stillhouse.diffusion.losses import REGRESSIONS, regression
from stillhouse.networks.lpips import LPIPS, check_lpips_shape

DISTANCES = ("l2", "l1", "huber", "lpips", "lpips+l2")


class Distance:
    """The distance d(output, target) of a student's images to their targets.

    It is deliberately no nn.Module and copies to itself: held by a LightningModule, LPIPS' weights stay out of checkpoints,
    averages, optimisers and DDP buckets. Move it with `to`.

    Args:
        loss: "l2", "l1", "huber": `regression`, sums over pixels. "lpips": `LPIPS`. "lpips+l2": LPIPS plus the mean square of
            the difference over pixels (rectified flow's released code, arXiv 2209.03003, whose CIFAR-10 distillation is by
            "lpips").
        shape: (C, H, W) of the images.
        lpips_weights: as of `load_lpips`, unused by the others.
        lpips_resize: as of `LPIPS`, unused by the others.

    Raises:
        ValueError: for an unknown loss or images that LPIPS does not take.
        FileNotFoundError: for missing weights of LPIPS; its other errors as of `load_lpips`.
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
        self.network: LPIPS | None = None  # of "lpips" and "lpips+l2"
        if loss not in REGRESSIONS:
            check_lpips_shape(shape)
            self.network = load_lpips(lpips_weights, lpips_resize)

    def __deepcopy__(self, memo: dict) -> "Distance":
        return self

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Compare images (B, C, H, W) in about [-1, 1], differentiably in both: (B,), float32."""
        if self.network is None:
            return regression(output, target, self.loss)
        distance = self.network(output, target)
        if self.loss == "lpips+l2":
            distance = distance + (output.float() - target.float()).square().flatten(1).mean(1)
        return distance

    def to(self, device: torch.device | str) -> "Distance":
        """Move LPIPS' weights, if there are any, in place. Returns the distance."""
        if self.network is not None:
            self.network.to(device)
        return self

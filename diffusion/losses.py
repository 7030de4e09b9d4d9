"""Objectives shared by several methods. All return one value per sample, (B,): sums over pixels, as EDM's."""

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser

REGRESSIONS = ("l1", "l2")


def log_normal_sigmas(count: int, mean: float, std: float, device: torch.device) -> Tensor:
    """Training noise levels with ln(sigma) ~ N(mean, std^2), (count,): EDM's law (its table 1: -1.2, 1.2)."""
    return (torch.randn(count, device=device) * std + mean).exp()


def denoising_score_matching(
    denoiser: Denoiser, images: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None = None
) -> Tensor:
    """lambda(sigma) |D(x0 + sigma e, sigma) - x0|^2 (EDM equation 2) with lambda = 1 / c_out^2.

    images (B, C, H, W) in [-1, 1], sigma (B,), noise like images, unit normal.
    """
    shape = (-1, 1, 1, 1)
    error = denoiser(images + sigma.view(shape) * noise, sigma, labels) - images
    return denoiser.preconditioning.loss_weight(sigma) * error.square().flatten(1).sum(1)


def regression(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Distance of a student's image to its teacher's: "l2" is |a - b|^2 / 2 (the paper's KL), "l1" is |a - b|."""
    if kind not in REGRESSIONS:
        raise ValueError(f"unknown regression loss {kind!r}; choose one of {', '.join(REGRESSIONS)}")
    error = (output.float() - target.float()).flatten(1)
    return error.abs().sum(1) if kind == "l1" else error.square().sum(1) / 2

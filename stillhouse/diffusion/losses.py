"""Objectives that several methods share. Losses are one value per sample, (B,): sums over pixels, as EDM's."""

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.ranks import average_over_ranks

REGRESSIONS = ("l1", "l2", "huber")
SCORE_WEIGHTINGS = ("edm", "dmd")
# h(r) = r^2 f''(r) of the f-divergence E_q f(p / q), with the teacher's density p, the generator's q and r = p / q; constant
# factors are left out (f-distill, arXiv 2502.15681).
DIVERGENCES = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": torch.sqrt,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jeffreys": lambda r: 1 + r,
}
RATIO_RANGE = (0.1, 20.0)  # to which f-distill clips a classifier's r


def log_normal_sigmas(count: int, mean: float, std: float, device: torch.device) -> Tensor:
    """Sample training noise levels with ln(sigma) ~ N(mean, std^2), (count,): EDM's distribution (its table 1: -1.2, 1.2)."""
    return (torch.randn(count, device=device) * std + mean).exp()


def noised(images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Add noise: x_sigma = x0 + sigma e, for images and noise (B, C, H, W) and sigma (B,)."""
    return images + sigma.view(-1, 1, 1, 1) * noise


def weighted_square(denoiser: Denoiser, error: Tensor, sigma: Tensor) -> Tensor:
    """Weight an error (B, C, H, W) at x0 as lambda(sigma) |error|^2, (B,), with lambda = 1 / c_out^2 (EDM, table 1)."""
    return denoiser.preconditioning.loss_weight(sigma) * error.square().flatten(1).sum(1)


def denoising_score_matching(
    denoiser: Denoiser,
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """Compute lambda(sigma) |D(x0 + sigma e, sigma) - x0|^2 (EDM equation 2) with lambda = 1 / c_out^2.

    Args:
        denoiser: D.
        images: x0 (B, C, H, W) in [-1, 1].
        sigma: noise levels (B,).
        noise: e, unit normal, of the images' shape.
        labels: as of `Denoiser`.
        augment_labels: as of `Denoiser`.

    Returns:
        (B,).
    """
    estimate = denoiser(noised(images, sigma, noise), sigma, labels, augment_labels)
    return weighted_square(denoiser, estimate - images, sigma)


def regression(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Compare a student's images with its teacher's; all norms and sums are over a sample's d = C H W values.

    "l2": |a - b|^2 / 2, Denoising Student's KL. "l1": the sum of |a - b|.
    "huber": sqrt(|a - b|^2 + c^2) - c, the pseudo-Huber loss: |a - b|^2 / 2c for small differences, |a - b| (not squared,
    and not the "l1" sum) for large ones. c = 0.00054 d as in 2-RF++'s code (arXiv 2405.20320), which divides the loss by
    d; iCT, where it comes from (arXiv 2310.14189), has 0.00054 sqrt(d).

    Args:
        output: images (..., C, H, W).
        target: images of that shape.
        kind: of `REGRESSIONS`.

    Returns:
        Distances of the leading shape, float32.

    Raises:
        ValueError: for another kind.
    """
    if kind not in REGRESSIONS:
        raise ValueError(f"unknown regression loss {kind!r}; choose one of {', '.join(REGRESSIONS)}")
    error = (output.float() - target.float()).flatten(-3)
    if kind == "l1":
        return error.abs().sum(-1)
    square = error.square().sum(-1)
    if kind == "l2":
        return square / 2
    return pseudo_huber(square, 0.00054 * error.shape[-1])


def pseudo_huber(square: Tensor, c: float) -> Tensor:
    """Compute sqrt(square + c^2) - c of squared norms, c >= 0, without cancellation; c = 0: the norm, with gradient 0 at 0."""
    root = (square + c**2).clamp_min(torch.finfo(square.dtype).tiny).sqrt()
    return square / (root + c)


def score_gradient(images: Tensor, fake: Tensor, target: Tensor, weighting: str) -> Tensor:
    """Compute the gradient, at a generator's images, of the integral KL between their noised distribution and the target's.

    The gradient of KL at one level is (s_fake - s_target)(x_sigma) dx0 with the scores s = (D - x_sigma) / sigma^2, so that

    "edm": D_fake - D_target, the gradient weighted by sigma^2 (Diff-Instruct, arXiv 2305.18455, released code);
    "dmd": that divided by the mean of |x0 - D_target| over a sample's pixels, and by the number of pixels, over which the
    released code of DMD2 (arXiv 2405.14867) takes the mean.

    Args:
        images: x0 (B, C, H, W).
        fake: the fake score's estimate of x0 from the noised images, of that shape.
        target: the teacher's estimate from the same noised images.
        weighting: of `SCORE_WEIGHTINGS`.

    Returns:
        (B, C, H, W), float32.
    """
    difference = fake.float() - target.float()
    if weighting == "edm":
        return difference
    size = (images.float() - target.float()).abs().flatten(1).mean(1).clamp_min(1e-8)
    return difference / (size.view(-1, *[1] * (images.ndim - 1)) * images[0].numel())


def estimate_error(images: Tensor, estimate: Tensor) -> Tensor:
    """Compute SiD's weight w = mean |y - T| over a sample's pixels, at least 1e-5, (B,), float32, without gradient."""
    return (images.float() - estimate.float()).detach().abs().flatten(1).mean(1).clamp_min(1e-5)


def divergence_weights(
    logits: Tensor, bins: Tensor, means: Tensor, divergence: str, ema: float
) -> tuple[Tensor, Tensor]:
    """Weigh samples, so that `score_gradient` times the weights is the gradient of an f-divergence (f-distill, arXiv 2502.15681).

    The ratio r of the densities of real and generated images is clipped, divided by its running mean among samples of about its
    noise level, and weighed by h; the weights are divided by their mean. Means are over the samples of all processes.

    Args:
        logits: of noised generated images in front of a classifier of real ones, ln r, (B,).
        bins: the range of noise levels of each, (B,), int64 in [0, N).
        means: the running means of r before, (N,), float64.
        divergence: of `DIVERGENCES`.
        ema: how much of a running mean stays where its bin has samples, in [0, 1).

    Returns:
        The weights (B,), float32, with a mean of 1, and the running means after, (N,).
    """
    ratio = logits.double().exp().clamp(*RATIO_RANGE)
    members = (bins[:, None] == torch.arange(len(means), device=bins.device)).double()
    found = average_over_ranks({"count": members.mean(0), "ratio": ratio @ members / len(ratio)}, ratio.device)
    present = found["count"] > 0
    newest = found["ratio"] / torch.where(present, found["count"], 1)
    means = torch.where(present, ema * means + (1 - ema) * newest, means)
    weights = DIVERGENCES[divergence](ratio / means[bins])
    mean = average_over_ranks({"weight": weights.mean()}, ratio.device)["weight"]
    return (weights / mean).float(), means


def score_identity_loss(images: Tensor, fake: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Compute SiD's loss of a generator, <T - F, T - y - alpha (T - F)> / w (arXiv 2404.04057, equation 23; released code).

    w is `estimate_error`.

    Args:
        images: y, the generator's (B, C, H, W).
        fake: F, the fake score's estimate of y from noised images, of that shape.
        target: T, the teacher's from the same noised images.
        alpha: at 1/2 the loss is (|T - y|^2 - |F - y|^2) / 2w.

    Returns:
        (B,), float32, which may be negative.
    """
    images, fake, target = images.float(), fake.float(), target.float()
    difference = target - fake
    size = estimate_error(images, target)
    return (difference * (target - images - alpha * difference)).flatten(1).sum(1) / size

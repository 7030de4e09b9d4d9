"""Spherical interpolation between latents (Denoising Student, arXiv 2101.02388, its figure of interpolations)."""

import torch
from torch import Tensor


def slerp(z0: Tensor, z1: Tensor, u: Tensor) -> Tensor:
    """Interpolate sin((1-u)w)/sin(w) z0 + sin(uw)/sin(w) z1, with w the angle between the flattened latents.

    Parallel latents, where the formula is 0/0, interpolate linearly.

    Args:
        z0: latents (B, ...).
        z1: latents of that shape.
        u: where to, in [0, 1], (U,).

    Returns:
        (U, B, ...).
    """
    flat = (-1, *[1] * (z0.ndim - 1))
    cosine = torch.nn.functional.cosine_similarity(z0.flatten(1).double(), z1.flatten(1).double())
    w = cosine.clamp(-1, 1).arccos().reshape(flat)
    u = u.double().reshape(-1, *[1] * z0.ndim)
    parallel = w.sin() < 1e-6
    sine = torch.where(parallel, 1.0, w.sin())
    weight0 = torch.where(parallel, 1 - u, ((1 - u) * w).sin() / sine)
    weight1 = torch.where(parallel, u, (u * w).sin() / sine)
    return (weight0 * z0 + weight1 * z1).to(z0.dtype)

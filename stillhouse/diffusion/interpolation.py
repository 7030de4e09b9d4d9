"""Spherical interpolation between latents (Denoising Student, arXiv 2101.02388, its figure of interpolations)."""

import torch
from torch import Tensor


def slerp(z0: Tensor, z1: Tensor, u: Tensor) -> Tensor:
    """sin((1-u)w)/sin(w) z0 + sin(uw)/sin(w) z1, with w the angle between the flattened latents.

    z0, z1: (B, ...); u: (U,) in [0, 1]. Returns (U, B, ...). Parallel latents, where the formula is 0/0, interpolate
    linearly.
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

"""Flows in the one language: X_t = (1 - t) e + t x0 is x = X_t / t at noise level sigma = (1 - t) / t.

So every denoiser is a flow with velocity v(X_t, t) = (D - X_t) / (1 - t), and D = X_t + (1 - t) v is what the velocity, held
fixed, makes of X_t at t = 1 (rectified flow, arXiv 2209.03003). Time runs from noise, t = 0, to data, t = 1; networks are read
from `start` > 0 on, where their highest noise level lies: the released code of rectified flow takes 1e-3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser, DenoiserFunction
from stillhouse.diffusion.guidance import GuidedDenoiser
from stillhouse.diffusion.teacher import Teacher


def time_of(sigma: Tensor | float) -> Tensor | float:
    """Convert a noise level to its time t in (0, 1]."""
    return 1 / (1 + sigma)


def level_of(t: Tensor | float) -> Tensor | float:
    """Convert times t in (0, 1] to noise levels."""
    return (1 - t) / t


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Shape times (B,) to be multiplied by `like` (B, ...): in its precision, with as many dimensions."""
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def between(noise: Tensor, images: Tensor, t: Tensor) -> Tensor:
    """Interpolate X_t = (1 - t) X_0 + t X_1, for X_0 and X_1 (B, C, H, W) and t (B,), float64."""
    return per_sample(1 - t, noise) * noise + per_sample(t, images) * images


def end_state(denoiser: DenoiserFunction, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Estimate X_1 (B, C, H, W) by f(z, t) = z + (1 - t) v(z, t), of states z of that shape at times t (B,) in (0, 1)."""
    return denoiser(z / per_sample(t, z), level_of(t), labels)


def velocity(
    denoiser: Denoiser | GuidedDenoiser,
    z: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
    until: Tensor | None = None,
) -> Tensor:
    """Compute a flow's velocity v(z, t) = (D - z) / (1 - t) without the division of a small difference.

    With x = z / t and D = c_skip x + c_out F it is ((c_skip / t - 1) z + c_out F) / (1 - t). A network with branches is read in
    its first one.

    Args:
        denoiser: the flow.
        z: states X_t (B, C, H, W).
        t: times (B,), float64 in (0, 1).
        labels: classes (B,), int64, or None.
        augment_labels: as of `Denoiser`.
        until: of a network of two times the second ones (B,), not before t: the result is u(z, t, until), the mean velocity in
            between, by which X_until = z + (until - t) u. None: t itself, where u = v.

    Returns:
        Velocities (B, C, H, W), in float64 if z is, else in float32.
    """
    if isinstance(denoiser, GuidedDenoiser):
        return denoiser.combine(
            lambda part, seen: velocity(part, z, t, seen, augment_labels, until), level_of(t), labels
        )
    c = denoiser.preconditioning(level_of(t))
    from_state, from_network = (c.skip / t - 1) / (1 - t), c.out / (1 - t)
    span = None if until is None else until - t
    out = denoiser.first_branch(per_sample(c.in_ / t, z) * z, c.noise, labels, augment_labels, span)
    return per_sample(from_state, z) * z + per_sample(from_network, z) * out


def euler_path(teacher: Teacher, noise: Tensor, labels: Tensor | None, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Follow a teacher's flow by Euler steps of equal length in t, from its highest noise level, where X_t is the noise, to 1.

    Args:
        teacher: the flow.
        noise: unit normal X_0 (B, C, H, W).
        labels: classes (B,), int64, or None.
        steps: the number of Euler steps.

    Yields:
        The state X_t and its velocity v(X_t, t), both (B, C, H, W), float64, at the beginning of each step; at last the end
        X_1 and, again, the last velocity.
    """
    first = teacher.sigmas()[0]
    start = time_of(first.item())
    denoiser, labels = teacher.denoiser, labels if teacher.conditional else None
    z = noise.double() * (start * denoiser.preconditioning.prior_std(first).item())
    for t in torch.linspace(start, 1, steps + 1, dtype=torch.float64)[:-1].tolist():
        with torch.no_grad():
            v = velocity(denoiser, z, z.new_full((len(z),), t), labels)
        yield z, v
        z = z + (1 - start) / steps * v
    yield z, v

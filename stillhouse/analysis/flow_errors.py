"""How far flows from one noise lie apart, and how curved their paths are: the errors that repeated rectification adds up.

A flow is a teacher, and Phi(x0) is what its solver makes of the noise x0. Distances are sums over pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.diffusion.flow import euler_path
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.sampling import Sampler, sampler_inputs
from stillhouse.ranks import progress_bar


@dataclass(frozen=True)
class Estimate:
    """The mean of a quantity over samples, and its standard error (None for one sample)."""

    mean: float
    error: float | None

    @property
    def root(self) -> float:
        """Square root of the mean."""
        return math.sqrt(self.mean)


def mean_with_error(values: Tensor) -> Estimate:
    """The mean of values (N,) and its standard error."""
    values = values.double()
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return Estimate(values.mean().item(), error)


def squared_distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """|a - b|^2 of each pair of images (N, C, H, W), a sum over pixels: (N,), float64.

    Raises:
        ValueError: for unequal shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"samples {tuple(ours.shape)} and {tuple(theirs.shape)} have no pairs to compare")
    return (ours.double() - theirs.double()).square().flatten(1).sum(1)


def sample_images(
    sample: Sampler,
    seeds: Tensor,
    *,
    shape: Sequence[int],
    num_classes: int,
    batch_size: int,
    device: torch.device | str,
    class_counts: Sequence[int] | None = None,
) -> Tensor:
    """Sample the images of given seeds.

    Args:
        sample: a function of (noise, labels).
        seeds: (N,), int64.
        shape: (C, H, W) of the noise.
        num_classes: of the labels; 0: there are none.
        batch_size: images that are sampled at once.
        device: where they are sampled.
        class_counts: as in `sample_labels`.

    Returns:
        Images (N, C, H, W), float32, on the CPU.

    Raises:
        ValueError: where images contain NaN or infinity.
    """
    batches = sampler_inputs(seeds.to(device), shape, num_classes, batch_size, class_counts)
    images = torch.cat([sample(*batch).float().cpu() for batch in batches])
    if not images.isfinite().all():
        raise ValueError("samples contain NaN or infinity: the sampler has diverged")
    return images


def path_bending(teacher: Teacher, noise: Tensor, labels: Tensor | None, steps: int) -> Tensor:
    """int |X_1 - X_0 - v(X_t, t)|^2 dt along each path from noise (B, C, H, W): (B,), float64, zero for straight ones.

    Its mean is the straightness S of rectified flow (arXiv 2209.03003), by the states of `steps` Euler steps; the
    flow's time is taken as a whole, from 0 to 1, where its network begins a little later. As X_1 - X_0 is then the mean of the
    velocities, the integral is their variance along the path.
    """
    mean, total = torch.zeros_like(noise, dtype=torch.float64), torch.zeros(len(noise), dtype=torch.float64)
    for count, (_, v) in zip(range(1, steps + 1), euler_path(teacher, noise, labels, steps), strict=False):
        deviation = v - mean  # Welford's recurrence, which does not subtract large numbers
        mean = mean + deviation / count
        total = total + (deviation * (v - mean)).flatten(1).sum(1).cpu()
    return total / steps


def straightness(
    teacher: Teacher,
    seeds: Tensor,
    steps: int,
    *,
    batch_size: int,
    device: torch.device | str,
    class_counts: Sequence[int] | None = None,
    label: str | None = None,
) -> Estimate:
    """The straightness S, a mean over the noise and labels of the seeds (N,), int64; `label` names a progress bar."""
    shape = (teacher.channels, teacher.resolution, teacher.resolution)
    values = []
    with progress_bar(len(seeds), label) as bar:
        for noise, labels in sampler_inputs(seeds.to(device), shape, teacher.num_classes, batch_size, class_counts):
            values.append(path_bending(teacher, noise, labels, steps))
            bar.update(len(noise))
    return mean_with_error(torch.cat(values))

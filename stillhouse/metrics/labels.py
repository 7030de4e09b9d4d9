"""The distribution of classes among evaluated samples, and real images drawn by the same distribution."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.checks import check_choice
from stillhouse.diffusion.random_numbers import sample_labels, sample_uniforms
from stillhouse.ranks import rank_and_world

DISTRIBUTIONS = ("uniform", "data")
NOTICEABLE = 0.02  # a total variation distance; ImageNet's 732 to 1,300 images per class make 0.013


def sampling_class_counts(distribution: str, data: Any) -> tuple[int, ...] | None:
    """The `class_counts` of `sample_labels`: those of the data's images for the distribution data, None for uniform.

    Args:
        distribution: uniform or data.
        data: a datamodule.

    Raises:
        ValueError: for another distribution.
    """
    check_choice("evaluation.labels", distribution, DISTRIBUTIONS)
    return (
        count_classes(data.reference().labels, data.num_classes)
        if distribution == "data" and data.num_classes
        else None
    )


def count_classes(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """The number of images of each class, given labels (N,) in [0, num_classes)."""
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


def distance_from_uniform(counts: tuple[int, ...]) -> float:
    """Total variation distance of the classes' shares from equal shares, in [0, 1): the least share of images to exchange."""
    return sum(abs(count / sum(counts) - 1 / len(counts)) for count in counts) / 2


def class_share_warning(distribution: str, counts: tuple[int, ...]) -> str | None:
    """A line of warning where samples have other shares of classes than the data's images; else None."""
    if distribution == "data" or distance_from_uniform(counts) < NOTICEABLE:
        return None
    least, most = (100 * extreme(counts) / sum(counts) for extreme in (min, max))
    return (
        f"evaluation.labels=uniform: samples have {len(counts)} classes equally often, and of the images that they are compared "
        f"with each has {least:.3g}% to {most:.3g}%: a perfect sampler can't come nearer than the row of real images, which "
        "follows the samples; evaluation.labels=data draws classes as often as the data has them"
    )


def check_class_shares(distribution: str, data: Any) -> None:
    """Print `class_share_warning`, from rank zero, where the data's images have classes.

    Raises:
        ValueError: for a class without images.
    """
    if not data.num_classes:
        return
    counts = count_classes(data.reference().labels, data.num_classes)
    if distribution == "uniform":
        _check_present(counts)
    line = class_share_warning(distribution, counts)
    if line and rank_and_world()[0] == 0:
        print(line, flush=True)


def _check_present(counts: Sequence[int]) -> None:
    if not all(counts):
        raise ValueError(
            f"class {list(counts).index(0)} of {len(counts)} has no real image among {sum(counts):,}, and "
            "evaluation.labels=uniform draws every class as often: correct data.num_classes, or set evaluation.labels=data"
        )


def draw_real_images(
    seeds: Tensor,
    labels: np.ndarray | None,
    among: Tensor,
    num_classes: int,
    class_counts: tuple[int, ...] | None,
) -> Tensor:
    """Draw a real image for each seed, with replacement.

    Classes follow the distribution of `sample_labels` with the same arguments. Without classes, and where the distribution is
    that of all images, all images at `among` are equally likely.

    Args:
        seeds: (B,), int64.
        labels: (N,), of all real images; None without classes.
        among: (n,), int64: indices of the images to draw from.
        num_classes: 0: there are none.
        class_counts: as in `sample_labels`.

    Returns:
        Indices (B,), int64.

    Raises:
        ValueError: for a class of the distribution without an image.
    """
    if not num_classes or class_counts is not None or len(set(count_classes(labels, num_classes))) == 1:
        return among[sample_labels(seeds, len(among))]
    candidates = torch.from_numpy(labels)[among]
    counts = candidates.bincount(minlength=num_classes)
    _check_present(counts.tolist())
    classes = sample_labels(seeds, num_classes)
    place = (counts.cumsum(0) - counts)[classes] + (sample_uniforms(seeds) * counts[classes]).long()
    return among[candidates.argsort(stable=True)[place]]


def describe_labels(num_classes: int, class_counts: tuple[int, ...] | None) -> str:
    """The distribution of labels in words, for a fingerprint."""
    if not num_classes:
        return "none"
    if class_counts is None:
        return f"uniform over {num_classes} by seed"
    return f"shares of the data's {num_classes} classes by seed, {sha256(repr(class_counts).encode()).hexdigest()[:8]}"

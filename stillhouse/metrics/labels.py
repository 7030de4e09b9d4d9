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
        ValueError: as `check_classes`.
    """
    check_classes(distribution, data)
    if not data.num_classes:
        return
    line = class_share_warning(distribution, count_classes(data.reference().labels, data.num_classes))
    if line and rank_and_world()[0] == 0:
        print(line, flush=True)


def check_classes(distribution: str, data: Any) -> None:
    """Raise ValueError for a class of the samples that has no real image, or none of those held out where there are any."""
    if not data.num_classes:
        return
    drawn = sampling_class_counts(distribution, data) or (1,) * data.num_classes
    for packed in filter(None, (data.reference(), data.held_out())):
        _check_present(drawn, count_classes(packed.labels, data.num_classes))


def _check_present(drawn: Sequence[int], counts: Sequence[int]) -> None:
    """Raise ValueError for a class that samples have, by their shares, and none of the images, by their counts."""
    absent = [place for place, (share, count) in enumerate(zip(drawn, counts, strict=True)) if share and not count]
    if absent:
        uniform = len(set(drawn)) == 1
        raise ValueError(
            f"class {absent[0]} of {len(counts)} has no real image among {sum(counts):,}, and evaluation.labels draws "
            + ("every class as often: " if uniform else "it: ")
            + "correct data.num_classes, or "
            + ("set evaluation.labels=data" if uniform else "complete the test images")
        )


def draw_real_images(
    seeds: Tensor,
    labels: np.ndarray | None,
    among: Tensor,
    num_classes: int,
    class_counts: tuple[int, ...] | None,
) -> Tensor:
    """Draw a real image for each seed, with replacement.

    Each has the class that `sample_labels` gives its seed, and within it all images at `among` are equally likely. Without
    classes, and where all images have these classes in these shares, all images at `among` are equally likely.

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
    drawn = np.array(class_counts or [1] * num_classes)
    if not num_classes or _proportional(drawn, np.array(count_classes(labels, num_classes))):
        return among[sample_labels(seeds, len(among))]
    candidates = torch.from_numpy(labels)[among]
    counts = candidates.bincount(minlength=num_classes)
    _check_present(drawn.tolist(), counts.tolist())
    classes = sample_labels(seeds, num_classes, class_counts)
    place = (counts.cumsum(0) - counts)[classes] + (sample_uniforms(seeds) * counts[classes]).long()
    return among[candidates.argsort(stable=True)[place]]


def _proportional(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one * other.sum(), other * one.sum())


def describe_labels(num_classes: int, class_counts: tuple[int, ...] | None) -> str:
    """The distribution of labels in words, for a fingerprint."""
    if not num_classes:
        return "none"
    if class_counts is None:
        return f"uniform over {num_classes} by seed"
    return f"shares of the data's {num_classes} classes by seed, {sha256(repr(class_counts).encode()).hexdigest()[:8]}"

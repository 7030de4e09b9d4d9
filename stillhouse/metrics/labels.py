"""Which classes evaluated samples have, and the real images that follow the same distribution."""

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
NOTICEABLE = 0.02  # of samples that would have another class: ImageNet's 732 to 1,300 images per class make 0.013


def sampling_class_counts(distribution: str, data: Any) -> tuple[int, ...] | None:
    """What `sample_labels` takes as `class_counts`: those of the data's images where its shares are asked for, else None.

    data: a datamodule. Errors: ValueError for another name than uniform or data, and those of reading the data's labels.
    """
    check_choice("evaluation.labels", distribution, DISTRIBUTIONS)
    return (
        count_classes(data.reference().labels, data.num_classes)
        if distribution == "data" and data.num_classes
        else None
    )


def count_classes(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """Images of each class, of labels (N,) in [0, num_classes)."""
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


def distance_from_uniform(counts: tuple[int, ...]) -> float:
    """Total variation distance of the classes' shares from equal ones: the least share of images to exchange, in [0, 1)."""
    return sum(abs(count / sum(counts) - 1 / len(counts)) for count in counts) / 2


def class_share_warning(distribution: str, counts: tuple[int, ...]) -> str | None:
    """One line where samples have other shares of classes than the data's images; else None."""
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
    """Indices (B,), int64, of the real image that each seed (B,), int64, draws with replacement of those at `among` (n,).

    labels (N,): of all real images. The draws' classes follow the distribution of `sample_labels` with these numbers: without
    classes, and where it is that of all images, those at `among` are equally likely.

    Errors: ValueError for a class of the distribution without an image.
    """
    if not num_classes or class_counts is not None or len(set(count_classes(labels, num_classes))) == 1:
        return among[sample_labels(seeds, len(among))]
    own = torch.from_numpy(labels)[among]
    counts = own.bincount(minlength=num_classes)
    _check_present(counts.tolist())
    classes = sample_labels(seeds, num_classes)
    place = (counts.cumsum(0) - counts)[classes] + (sample_uniforms(seeds) * counts[classes]).long()
    return among[own.argsort(stable=True)[place]]


def describe_labels(num_classes: int, class_counts: tuple[int, ...] | None) -> str:
    """The distribution, for a fingerprint."""
    if not num_classes:
        return "none"
    if class_counts is None:
        return f"uniform over {num_classes} by seed"
    return f"shares of the data's {num_classes} classes by seed, {sha256(repr(class_counts).encode()).hexdigest()[:8]}"

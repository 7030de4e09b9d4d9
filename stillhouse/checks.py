"""Checks of options: every error is one line that names the option, its value and what would be accepted."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def check_counts(minimum: int = 1, **options: int) -> None:
    """Refuse options that are no integers of at least `minimum`."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_memory(needed: int, what: str) -> None:
    """Refuse what needs more memory than this machine, or the container that this runs in, has at all.

    Args:
        needed: bytes.
        what: needs them, with the options to lower.

    Raises:
        ValueError: saying both.
    """
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    present = min(present, int(allowed)) if allowed.isdigit() else present
    if needed > present:
        raise ValueError(f"{what} would take some {needed / 1e9:,.3g} GB of memory, of {present / 1e9:,.3g} GB here")


def check_integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Refuse what is no list of positive integers; returns it as a tuple."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list of integers, got {values!r}")
    check_counts(**{f"{name}[{i}]": value for i, value in enumerate(values)})
    return tuple(values)


def check_above(bound: float, **options: float) -> None:
    """Refuse options that are no numbers above `bound`, NaN among them."""
    for name, value in options.items():
        if not value > bound:
            raise ValueError(f"{name} must be above {bound}, got {value!r}")


def check_fractions(**options: float) -> None:
    """Refuse options that are no numbers in [0, 1)."""
    for name, value in options.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_multiple(divisor: int, **options: int) -> None:
    """Refuse options that are no multiples of `divisor`."""
    for name, value in options.items():
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")


def check_labels(num_classes: int, label_dropout: float) -> None:
    """Refuse a network's options of labels that do not fit each other."""
    check_counts(0, num_classes=num_classes)
    check_fractions(label_dropout=label_dropout)
    if label_dropout and not num_classes:
        raise ValueError(f"label_dropout={label_dropout} needs labels: set num_classes above 0, or label_dropout=0")


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Refuse a value that is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_levels(resolution: int, channel_mult: tuple[int, ...], attn_resolutions: tuple[int, ...]) -> None:
    """Refuse levels of a U-Net that do not halve the resolution each, and attention at other resolutions than theirs."""
    levels = len(channel_mult)
    if not levels or resolution % 2 ** (levels - 1):
        raise ValueError(
            f"channel_mult must name 1 or more levels that halve the resolution each, "
            f"got {levels} levels at resolution {resolution}"
        )
    sizes = [resolution >> level for level in range(levels)]
    if not set(attn_resolutions) <= set(sizes):
        raise ValueError(f"attn_resolutions must be among the levels' resolutions {sizes}, got {attn_resolutions}")


def check_inputs(
    network: nn.Module,
    x: Tensor,
    noise_labels: Tensor,
    class_labels: Tensor | None,
    augment_labels: Tensor | None,
    span: Tensor | None = None,
) -> None:
    """Compare shapes and dtypes of a network's inputs with its attributes; no values are read, so it costs no transfer."""
    expected = (network.in_channels, network.resolution, network.resolution)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise ValueError(f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
    batch = len(x)
    if tuple(noise_labels.shape) != (batch,) or not noise_labels.is_floating_point():
        raise ValueError(f"noise_labels must be floats of shape ({batch},), got {_describe(noise_labels)}")
    if class_labels is not None:
        if not network.num_classes:
            raise ValueError("class_labels were given to an unconditional network (num_classes=0); pass None")
        if tuple(class_labels.shape) != (batch,) or class_labels.dtype != torch.int64:
            raise ValueError(f"class_labels must be int64 of shape ({batch},), got {_describe(class_labels)}")
    if augment_labels is not None:
        if not network.augment_dim:
            raise ValueError("augment_labels were given to a network without them (augment_dim=0); pass None")
        if tuple(augment_labels.shape) != (batch, network.augment_dim):
            raise ValueError(
                f"augment_labels must have shape ({batch}, {network.augment_dim}), got {_describe(augment_labels)}"
            )
    if network.two_times != (span is not None):
        text = "needs a span to its second time" if network.two_times else "has one time and takes no span"
        raise ValueError(f"this {type(network).__name__} {text}: condition_on_second_time(network) adds one")
    if span is not None and tuple(span.shape) != (batch,):
        raise ValueError(f"span must be floats of shape ({batch},), got {_describe(span)}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"

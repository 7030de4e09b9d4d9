"""Averages of weights by power rules, and others that are made of stored ones after training (EDM2, arXiv 2312.02696, section 3).

An average after t updates by the rule of exponent gamma weighs the weights after update s <= t by the density
p(s) = (gamma + 1) s^gamma / t^(gamma + 1). A linear combination of stored averages has the same combination of their densities,
so that one is sought whose density is nearest to that of the average that was not kept.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from stillhouse.checkpoints.weights import read_card, read_state


def relative_width(gamma: float) -> float:
    """The standard deviation of the density (gamma + 1) t^gamma on [0, 1]: EDM2's sigma_rel, by its equation 123."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


@cache
def power_of_width(sigma_rel: float) -> float:
    """The gamma of which `relative_width` is sigma_rel: the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2."""
    square = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - square, 12 - square]).real.max()), 0.0)


class Profile(NamedTuple):
    """The density of an average: after how many updates it was taken, and its rule's exponent."""

    updates: float
    gamma: float


def inner_product(a: Profile, b: Profile) -> float:
    """Integrate the product of two densities (equation 151)."""
    first, last = sorted((a, b))
    shared = (first.updates / last.updates) ** last.gamma / last.updates
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * shared


def combination(stored: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Find the combination of stored densities that is nearest to the wanted one (algorithm 3).

    Args:
        stored: the densities, no two of them equal.
        wanted: the density.

    Returns:
        A factor for each, of sum 1, and the distance that is left, as a share of the wanted density's norm.
    """
    products = np.array([[inner_product(a, b) for b in stored] for a in stored])
    with_wanted = np.array([inner_product(a, wanted) for a in stored])
    factors = np.linalg.solve(products, with_wanted)
    factors /= factors.sum()
    norm = inner_product(wanted, wanted)
    square = norm - 2 * factors @ with_wanted + factors @ products @ factors
    return factors.tolist(), math.sqrt(max(square, 0.0) / norm)


def stored_profiles(folder: Path) -> dict[Path, Profile]:
    """List the averages that callbacks.ema stored in a folder, with their densities."""
    cards = {file: read_card(file) for file in sorted(folder.glob("*.safetensors"))}
    return {file: Profile(card["updates"], card["gamma"]) for file, card in cards.items()}


def reconstructed(folder: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """Make the average of another width at the end of a run's training.

    Args:
        folder: of the stored averages.
        sigma_rel: of the wanted one.

    Returns:
        Its state dict, float32, and the distance of its density from the wanted one, as `combination`.

    Raises:
        ValueError: for a width that no average has, and a folder with fewer than two averages.
        OSError: for damaged files.
    """
    if not 0 < sigma_rel <= relative_width(0):
        raise ValueError(f"the relative width of an average lies in (0, {relative_width(0):.4f}], got {sigma_rel}")
    stored = stored_profiles(folder)
    if len(stored) < 2:
        raise ValueError(
            f"{folder} holds {len(stored)} averages, too few to make another one of: train with callbacks.ema.snapshots_kimg"
        )
    wanted = Profile(max(profile.updates for profile in stored.values()), power_of_width(sigma_rel))
    factors, distance = combination(list(stored.values()), wanted)
    total: dict[str, Tensor] = {}
    for file, factor in zip(stored, factors, strict=True):
        for name, value in read_state(file).items():
            total[name] = factor * value.float() + total.get(name, 0.0)
    return total, distance

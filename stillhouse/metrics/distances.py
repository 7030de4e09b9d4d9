"""Distances between two sets of features, as pure functions in float64."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BANDWIDTHS = (
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
)  # of `gaussian_kernel_distance`: from one mode of the planar data sets to all of them
_ENTRIES = 1 << 23  # of a distance matrix held at once: 64 MB in float64


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> Tensor:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two Gaussians (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the square roots of the eigenvalues of cov1^(1/2) cov2 cov1^(1/2), which is symmetric:
    there are no complex parts, and singular covariances (fewer samples than dimensions) need no correction.

    Args:
        mu1: (D,), as mu2.
        cov1: (D, D), symmetric, as cov2.
        mu2: mean of the other Gaussian.
        cov2: covariance of the other Gaussian.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: for unequal dimensions, or entries that are not finite.
    """
    mu1, cov1, mu2, cov2 = (t.double() for t in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise ValueError(
            f"the two sets have {len(mu1)} and {len(mu2)} features; they must come from the same extractor and layer"
        )
    if not all(t.isfinite().all() for t in (mu1, cov1, mu2, cov2)):
        raise ValueError("feature statistics contain NaN or infinity; look at the samples")
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root_trace = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace
    return distance.clamp(min=0)  # rounding alone can make it negative


def kernel_distance(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Tensor:
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), whose mean over subsets is the KID.

    Args:
        features: (N, D).
        reference: (M, D).
        subsets: how many are drawn, each without replacement.
        subset_size: rows of a subset, at most min(N, M).
        seed: of the drawing.

    Returns:
        (subsets,), float64; values may be slightly negative.

    Raises:
        ValueError: for fewer than two rows on a side.
    """
    size = min(subset_size, len(features), len(reference))
    if size < 2:
        raise ValueError(
            f"kernel distance needs at least 2 samples on each side, got {len(features)}, {len(reference)}"
        )
    generator = torch.Generator().manual_seed(seed)

    def subset(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(matrix: Tensor) -> Tensor:
        return (matrix.sum() - matrix.trace()) / (size * (size - 1))

    values = []
    for _ in range(subsets):
        x, y = subset(features), subset(reference)
        values.append(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())
    return torch.stack(values)


def gaussian_kernel_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3) under the kernel mean_h exp(-|x - y|^2 / (2 h^2)).

    The bandwidths h are fixed (`BANDWIDTHS`), for coordinates in [-1, 1]: for features of another scale the kernel is nearly
    constant or nearly zero.

    Args:
        features: (N, D).
        reference: (M, D).

    Returns:
        A float64 scalar, which may be slightly negative.

    Raises:
        ValueError: for fewer than two rows on a side.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError(
            f"a kernel distance needs at least 2 samples on each side, got {len(features)} and {len(reference)}"
        )
    x, y = features.double(), reference.double()

    def total(rows: Tensor, others: Tensor) -> Tensor:
        exponents = (d.square() / -2 for d in _distances(rows, others, exact=True))
        return sum((part / h**2).exp().sum() for part in exponents for h in BANDWIDTHS) / len(BANDWIDTHS)

    def within(rows: Tensor) -> Tensor:  # without the pairs of a row with itself, whose kernel is 1
        return (total(rows, rows) - len(rows)) / (len(rows) * (len(rows) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


def precision_recall(
    features: Tensor, reference: Tensor, neighbours: int = 3, radii: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of `features` inside the union of balls around the reference rows, each of which reaches to the
    row's k-th neighbour in its own set; recall is the same with the sets exchanged.

    Args:
        features: (N, D).
        reference: (M, D).
        neighbours: k.
        radii: (M,), `neighbour_distances` of the reference, where they are known: they take longest of all.

    Returns:
        Precision and recall, float64 scalars in [0, 1].

    Raises:
        ValueError: for k rows or fewer on a side.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more samples than that on each side, "
            f"got {len(features)} and {len(reference)}"
        )
    features, reference = features.double(), reference.double()
    radii = neighbour_distances(reference, neighbours) if radii is None else radii
    precision = _inside(features, reference, radii)
    recall = _inside(reference, features, neighbour_distances(features, neighbours))
    return precision, recall


def neighbour_distances(rows: Tensor, neighbours: int = 3) -> Tensor:
    """Distances (N,), float64, of the rows (N, D) to the k-th neighbour of each among the others."""
    rows = rows.double()
    # The nearest of all is the row itself.
    return _of_each(rows, rows, lambda d: d.topk(neighbours + 1, dim=1, largest=False).values[:, -1])


def memorised_share(features: Tensor, training: Tensor, held_out: Tensor, own: Tensor | None = None) -> Tensor:
    """The share of samples that are nearer to a training image than to any held-out one.

    Were a sample as new as a held-out image it would fall to either side by their numbers, N / (N + M) on average, but for the
    spread of the two sets: the value of the held-out images themselves says what that is worth.

    Args:
        features: (B, D).
        training: (N, D).
        held_out: (M, D).
        own: (B,), int64, where the features are held-out images: their own places, which do not count; None elsewhere.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: for fewer than two held-out images.
    """
    if len(held_out) < 2:
        raise ValueError(f"memorisation compares with 2 held-out images at least, got {len(held_out)}")
    features, training, held_out = features.double(), training.double(), held_out.double()
    nearest = _of_each(features, training, lambda d: d.amin(1))
    others = _of_each(features, held_out, lambda d: d.amin(1), left_out=own)
    return (nearest < others).double().mean()


def _distances(rows: Tensor, others: Tensor, exact: bool = False) -> Iterator[Tensor]:
    """Euclidean distances of `rows` to `others`, some rows at a time; exact: from differences, not a matrix product."""
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"
    parts = rows.split(max(1, _ENTRIES // len(others)))
    return (torch.cdist(part, others, compute_mode=mode) for part in parts)


def _of_each(rows: Tensor, others: Tensor, value: Callable[[Tensor], Tensor], left_out: Tensor | None = None) -> Tensor:
    """(N,), float64: a value of each row's distances (n, M) to `others`; left_out: places, int64 (N,), that do not count.

    The values are copied into one tensor: a small one kept of each part would lie where a large one was freed, and in a process
    that keeps what it frees (`launch.allocator`) the next large one would take new memory, in all 18 GB for 60,000 rows.
    """
    values, first = rows.new_empty(len(rows)), 0
    for d in _distances(rows, others):
        part = slice(first, first + len(d))
        if left_out is not None:
            d.scatter_(1, left_out[part, None], math.inf)
        values[part] = value(d)
        first += len(d)
    return values


def _inside(rows: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    return _of_each(rows, centres, lambda d: (d <= radii).any(dim=1)).mean()


def inception_score(logits: Tensor, splits: int = 10) -> Tensor:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016) of consecutive parts; their mean is the score in papers (10 splits).

    Args:
        logits: (N, K).
        splits: number of parts.

    Returns:
        (splits,), float64.

    Raises:
        ValueError: for fewer samples than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"an inception score over {splits} splits needs at least as many samples, got {len(logits)}")
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        log_marginal = part.logsumexp(dim=0) - math.log(len(part))
        scores.append((part.exp() * (part - log_marginal)).sum(dim=1).mean().exp())
    return torch.stack(scores)


def wasserstein_distance(a: Tensor, b: Tensor) -> float:
    """The exact 2-Wasserstein distance of two finite sets: min over pairings pi of sqrt(mean |a_i - b_pi(i)|^2).

    It takes N^3 time: seconds for 2,000. Between samples of two distributions it is above the distance of these, and samples
    of one distribution do not have distance zero, the less so the higher the dimension.

    Args:
        a: (N, ...).
        b: of the same shape.

    Raises:
        ValueError: for unequal shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"sets {tuple(a.shape)} and {tuple(b.shape)} cannot be paired one to one")
    from scipy.optimize import linear_sum_assignment  # takes half a second, and few measure it

    costs = torch.cdist(a.flatten(1).double(), b.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    rows, columns = linear_sum_assignment(costs.numpy())
    return costs[rows, columns].mean().sqrt().item()

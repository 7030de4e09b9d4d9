"""Distances between two sets of features, as pure functions in float64."""

import math
from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

BANDWIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of `gaussian_kernel_distance`: from a mode of the planar laws to all of them
_ENTRIES = 1 << 26  # of a distance matrix held at once: 512 MB in float64


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> Tensor:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two Gaussians (Heusel et al. 2017, eq. 6), float64 scalar.

    mu (D,), cov (D, D) symmetric. The trace of the root is taken from the eigenvalues of cov1^(1/2) cov2 cov1^(1/2),
    which is symmetric: no complex parts, and singular covariances (fewer samples than dimensions) need no remedy.
    Raises ValueError for entries that are not finite.
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
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 (Binkowski et al. 2018): one float64 value per subset.

    features (N, D), reference (M, D). Their mean is the KID. Each subset is drawn without replacement, by `seed`;
    `subset_size` is cut to min(N, M). Values may be slightly negative.
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
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3), float64 scalar, under the kernel mean_h exp(-|x - y|^2 / (2 h^2)).

    features (N, D), reference (M, D), of at least 2 rows each. The bandwidths h are fixed (BANDWIDTHS), for coordinates in
    [-1, 1]: features of another scale see the kernel as nearly constant or nearly zero. May be slightly negative.
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


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), float64 scalars in [0, 1].

    features (N, D), reference (M, D). Precision: share of `features` inside the union of balls around each reference
    row that reach to its k-th neighbour in its own set; recall: the same with the sets exchanged.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more samples than that on each side, "
            f"got {len(features)} and {len(reference)}"
        )
    features, reference = features.double(), reference.double()
    precision = _inside(features, reference, _radii(reference, neighbours))
    recall = _inside(reference, features, _radii(features, neighbours))
    return precision, recall


def _distances(rows: Tensor, others: Tensor, exact: bool = False) -> Iterator[Tensor]:
    """Euclidean distances of `rows` to `others`, in slabs of whole rows; exact: from differences, not a matrix product."""
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"
    slabs = rows.split(max(1, _ENTRIES // len(others)))
    return (torch.cdist(slab, others, compute_mode=mode) for slab in slabs)


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    # The nearest of all is the row itself.
    return torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in _distances(rows, rows)])


def _inside(rows: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    return torch.cat([(d <= radii).any(dim=1) for d in _distances(rows, centres)]).double().mean()


def inception_score(logits: Tensor, splits: int = 10) -> Tensor:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016) of each of `splits` consecutive parts: float64 (splits,).

    logits (N, K). The mean of the parts is the score that papers print (10 splits).
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
    """W2 = min over pairings of sqrt(mean |a_i - b_pi(i)|^2), between the uniform laws on a and b (N, ...), exactly.

    It takes N^3 time: seconds for 2,000. Between draws from two laws it is above their own distance, and two sets of one law
    do not have zero, the less so the higher the dimension. Errors: ValueError for sets of other sizes.
    """
    if a.shape != b.shape:
        raise ValueError(f"sets {tuple(a.shape)} and {tuple(b.shape)} cannot be paired one to one")
    costs = torch.cdist(a.flatten(1).double(), b.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    rows, columns = linear_sum_assignment(costs.numpy())
    return costs[rows, columns].mean().sqrt().item()

"""Features of real images, which samples are compared with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.files import write_cache
from stillhouse.metrics.distances import neighbour_distances
from stillhouse.metrics.extractors import FeatureExtractor
from stillhouse.metrics.statistics import RunningGaussian, load_statistics, save_statistics
from stillhouse.ranks import gather_rows, progress_bar, rank_slice, run_on_rank_zero


class PackedImages(Protocol):
    """What is needed of a packed data set (datamodules.components.packed_images)."""

    hash: str
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]: ...


_PUBLISHED = {"file", "url", "sha256"}


@dataclass(frozen=True)
class Reference:
    """Features of the real images.

    Attributes:
        mu: mean (D,), float64.
        cov: covariance (D, D), float64.
        hash: of the images, or of the statistics file, that they come from.
        features: all rows (N, D), where they are kept.
        held_out: rows (M, D) of the real images that no training sees, where they are kept and there are any.
        held_out_hash: of these images.
    """

    mu: Tensor
    cov: Tensor
    hash: str
    features: Tensor | None = None
    held_out: Tensor | None = None
    held_out_hash: str | None = None

    def to(self, device: torch.device | str) -> "Reference":
        """The same on a device."""
        if self.mu.to(device) is self.mu:
            return self
        rows, others = (None if kept is None else kept.to(device) for kept in (self.features, self.held_out))
        return replace(self, mu=self.mu.to(device), cov=self.cov.to(device), features=rows, held_out=others)

    @cached_property
    def radii(self) -> Tensor:
        """`neighbour_distances` of the features, kept for all that is compared with them."""
        return neighbour_distances(self.features)


def real_features(
    packed: PackedImages,
    extractor: FeatureExtractor,
    batch_size: int,
    device: torch.device | str,
    *,
    indices: np.ndarray | None = None,
    label: str | None = None,
) -> Tensor:
    """Extract features of real images; all ranks share the work, and every rank must call it.

    Args:
        packed: the data set.
        extractor: of features.
        batch_size: images at once.
        device: to compute on.
        indices: (n,), of the images; None: all.
        label: names a progress bar.

    Returns:
        (n, D) in the order of `indices`, on every rank.
    """
    total = len(packed) if indices is None else len(indices)
    parts = list(_batches(packed, extractor, batch_size, device, indices, label))
    rows = torch.cat(parts) if parts else torch.zeros(0, extractor.dim, device=device)
    return gather_rows(rows, total)


def reference_statistics(
    packed: PackedImages,
    extractor: FeatureExtractor,
    cache_folder: str | Path | None = None,
    *,
    keep_features: bool = False,
    held_out: PackedImages | None = None,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    label: str | None = None,
) -> Reference:
    """The reference of all images of a data set; all ranks share the work, and every rank must call it.

    Of a fast extractor the exact one is used.

    Args:
        packed: the data set.
        extractor: of features.
        cache_folder: where mean and covariance are kept, named by the hashes of extractor and images; None: nowhere.
        keep_features: whether all rows are kept too, which KID, precision and recall need; they are computed each time.
        held_out: real images that no training sees, whose rows are kept with the others, where a metric needs them.
        batch_size: images at once.
        device: to compute on.
        label: names a progress bar.

    Raises:
        ValueError: for a damaged cache file, which is left as it is.
    """
    extractor = getattr(extractor, "exact", None) or extractor
    cache = None
    if cache_folder is not None:
        cache = Path(cache_folder) / f"{extractor.name}-{extractor.hash[:16]}-{packed.hash[:16]}.npz"
        identity = f"extractor {extractor.hash}, images {packed.hash}"
        cached = run_on_rank_zero(lambda: load_statistics(cache, identity) if cache.exists() else None)
        if cached is not None and not keep_features:
            return Reference(*cached, packed.hash).to(device)
    rows = others = others_hash = None
    if keep_features and held_out is not None:
        others, others_hash = real_features(held_out, extractor, batch_size, device, label=label), held_out.hash
    if keep_features:
        rows = real_features(packed, extractor, batch_size, device, label=label)
        gaussian = RunningGaussian(extractor.dim, device).update(rows)
    else:
        gaussian = RunningGaussian(extractor.dim, device)
        for part in _batches(packed, extractor, batch_size, device, None, label):
            gaussian.update(part)
        gaussian = gaussian.merged()
    if cache is not None and cached is None:
        run_on_rank_zero(lambda: write_cache(lambda: save_statistics(cache, gaussian.mean, gaussian.cov, identity)))
    return Reference(gaussian.mean, gaussian.cov, packed.hash, rows, others, others_hash)


def load_reference(path: str | Path) -> Reference:
    """Read a published reference (an npz with mu and sigma, as EDM's), on the CPU; its hash is the SHA-256 of the file."""
    mu, cov = load_statistics(path)
    return Reference(mu, cov, sha256(Path(path).read_bytes()).hexdigest())


def published_reference(options: Mapping[str, Any], extractor: FeatureExtractor) -> Reference:
    """The published reference that `evaluation.reference` names, on the CPU, in place of the data set's own images.

    Args:
        options: `file`, and where known its `url` and `sha256`.
        extractor: whose features they must be.

    Raises:
        FileNotFoundError: for a missing file.
        OSError: for a file with another hash.
        ValueError: for other options, a damaged file, or statistics of another number of features.
    """
    if "file" not in options or not options.keys() <= _PUBLISHED:
        raise ValueError(
            f"evaluation.reference has {', '.join(map(str, options))}; give file=PATH.npz and at most url and sha256"
        )
    path, url, expected = (options.get(key) for key in ("file", "url", "sha256"))
    path = Path(path).expanduser()
    if not path.is_file():
        fetch = f"add download=true to fetch {url}, or put the file there" if url else "put the file there"
        raise FileNotFoundError(f"no reference statistics at {path}; {fetch}")
    reference = load_reference(path)
    if expected is not None and reference.hash != str(expected).lower():
        raise OSError(
            f"{path} has SHA-256 {reference.hash}, expected {expected}; fetch it again or correct evaluation.reference.sha256"
        )
    if len(reference.mu) != extractor.dim:
        raise ValueError(
            f"{path} has {len(reference.mu)} features, the {extractor.name} extractor {extractor.dim}; "
            "choose statistics made by this extractor"
        )
    return reference


def _batches(
    packed: PackedImages,
    extractor: FeatureExtractor,
    batch_size: int,
    device: torch.device | str,
    indices: np.ndarray | None,
    label: str | None,
) -> Iterator[Tensor]:
    """Features of this rank's share, batch by batch."""
    indices = np.arange(len(packed)) if indices is None else indices
    mine = indices[rank_slice(len(indices))]
    extractor = extractor.to(device)
    with progress_bar(len(mine), label) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            yield extractor(packed.fetch(batch)[0].to(device))
            bar.update(len(batch))

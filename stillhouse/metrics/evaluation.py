"""Measurements of samplers: sample, quantise, extract features, compare with real images, with error bars over blocks."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.checks import check_memory
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS
from stillhouse.metrics.distances import (
    frechet_distance,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
    memorised_share,
    precision_recall,
    wasserstein_distance,
)
from stillhouse.metrics.extractors import FeatureExtractor
from stillhouse.metrics.fidelity import NO_WEIGHTS_ADVICE
from stillhouse.metrics.images import UINT8_RULE
from stillhouse.metrics.labels import describe_labels, draw_real_images
from stillhouse.metrics.records import Record
from stillhouse.metrics.reference import PackedImages, Reference, real_features
from stillhouse.metrics.sampling import Sampler, sample_features
from stillhouse.metrics.statistics import RunningGaussian
from stillhouse.ranks import rank_and_world

METRICS = ("fid", "kid", "precision", "recall", "memorisation", "is", "w2", "mmd")
DISTANCES = ("fid", "kid", "w2", "mmd")  # of which less is better
SHIFT_SAMPLES = 2000  # from which the shift of a fast extractor is measured
MAX_W2_SAMPLES = 5000  # samples: the time of an exact assignment grows with their cube
MIN_REAL_IMAGES = {
    "fid": 2,
    "kid": 2,
    "precision": 4,
    "recall": 4,
}  # real images: a covariance takes 2, a third neighbour 4
_NEED_REAL_FEATURES = {"kid", "precision", "recall", "memorisation", "w2", "mmd"}
_NEED_EQUAL_COUNTS = {"w2", "mmd"}


def measure_sampler(
    sample: Sampler,
    *,
    name: str,
    subject: str,
    nfe: int,
    reference: Reference,
    extractor: FeatureExtractor,
    num_samples: int,
    blocks: int = 3,
    shape: Sequence[int],
    num_classes: int,
    batch_size: int,
    device: torch.device | str,
    metrics: Sequence[str] = ("fid",),
    weights: str | None = None,
    precision: str = "32-true",
    steps: int | None = None,
    solver: str | None = None,
    teacher: str | None = None,
    class_counts: Sequence[int] | None = None,
    first_seed: int = 0,
    progress: bool = True,
) -> list[Record]:
    """Measure a sampler: one record per metric, with one value per block and their mean and standard deviation.

    Block b is of the seeds from first_seed + b * num_samples on. `images_per_second` is the median over blocks, so that
    compilation in the first does not count. `weights`, `precision`, `steps`, `solver` and `teacher` are recorded, not applied.

    Args:
        sample: a function of (noise, labels).
        name: of the run or the teacher.
        subject: student or teacher.
        nfe: network evaluations per sample.
        reference: features of the real images.
        extractor: of features.
        num_samples: of each block.
        blocks: how many.
        shape: (C, H, W) of the noise.
        num_classes: of the labels, as in `sample_labels`; 0: there are none.
        batch_size: images that are sampled at once.
        device: to compute on.
        metrics: some of `METRICS`.
        weights: of a student, an average's name or raw; None for a teacher.
        precision: of sampling; metrics are computed in float32 and above.
        steps: of the solver, where that is a choice.
        solver: its name, where that is a choice.
        teacher: the name of a student's teacher.
        class_counts: as in `sample_labels`.
        first_seed: of the first block.
        progress: whether a progress bar is shown.

    Raises:
        ValueError: for settings that can't be measured, or samples that are not finite.
    """
    _check(metrics, reference, extractor, num_samples, blocks, batch_size)
    reference = reference.to(device)
    labels = {"num_classes": num_classes, "class_counts": class_counts}
    sampling = {"shape": shape, **labels, "batch_size": batch_size, "device": device}
    measure_shift(
        sample, extractor, reference, first_seed + torch.arange(min(num_samples, SHIFT_SAMPLES)), sampling, name
    )
    values: list[dict[str, float]] = []
    rates = []
    for block in range(blocks):
        seeds = first_seed + torch.arange(block * num_samples, (block + 1) * num_samples)
        rows, seconds = sample_features(
            sample,
            extractor,
            seeds,
            **sampling,
            label=f"{name} {subject}, block {block + 1}/{blocks}" if progress else None,
        )
        values.append(_scores(rows, reference, extractor, metrics))
        rates.append(num_samples / seconds)
    fingerprint = _fingerprint(extractor, reference, num_samples, blocks, labels, weights, precision, first_seed)
    how = {"steps": steps, "solver": solver, "teacher": teacher}
    return _records(values, extractor, fingerprint, name, subject, nfe, statistics.median(rates), how)


def measure_real_images(
    packed: PackedImages,
    *,
    held_out: PackedImages | None = None,
    name: str,
    reference: Reference,
    extractor: FeatureExtractor,
    num_samples: int,
    blocks: int = 3,
    num_classes: int,
    batch_size: int,
    device: torch.device | str,
    metrics: Sequence[str] = ("fid",),
    precision: str = "32-true",
    class_counts: Sequence[int] | None = None,
    first_seed: int = 0,
    progress: bool = True,
) -> list[Record]:
    """Measure real images, drawn with replacement: the floor, what a perfect sampler would score.

    They are drawn from `held_out`, images of the same kind that no training sees, else from the data set itself.

    Draw i depends on seed i alone; blocks and the distribution of classes are those of `measure_sampler` (see
    `draw_real_images`). Where w2 or mmd is measured, the draws are from the real images that these do not compare with: a set
    is at distance zero from itself. With the same num_classes, class_counts and precision as there the records have the same
    fingerprint and share its table.

    Args and errors are as in `measure_sampler`; `packed` is the data set.
    """
    _check(metrics, reference, extractor, num_samples, blocks, batch_size)
    reference = reference.to(device)
    seeds = first_seed + torch.arange(blocks * num_samples)
    source = held_out or packed
    disjoint = held_out is None and _NEED_EQUAL_COUNTS.intersection(metrics)
    among = split_real_images(len(packed), num_samples)[1] if disjoint else torch.arange(len(source))
    labels = {"num_classes": num_classes, "class_counts": class_counts}
    draws = draw_real_images(seeds, source.labels, among, **labels)
    label = f"{name} real" if progress else None
    rows = real_features(source, extractor, batch_size, device, indices=draws.numpy(), label=label)
    blocks_of = zip(rows.split(num_samples), draws.to(rows.device).split(num_samples), strict=True)
    values = [_scores(part, reference, extractor, metrics, own) for part, own in blocks_of]
    fingerprint = _fingerprint(extractor, reference, num_samples, blocks, labels, None, precision, first_seed)
    return _records(values, extractor, fingerprint, name, "real", 0, None, {})


class _ExtractorPair:
    """The features of a fast extractor beside those of the exact one that it replaces."""

    def __init__(self, fast: FeatureExtractor):
        self.fast, self.exact, self.dim = fast, fast.exact, 2 * fast.dim

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.fast(images), self.exact(images)], dim=1)

    def to(self, device: torch.device | str) -> "_ExtractorPair":
        self.fast.to(device)
        return self


def measure_shift(
    sample: Sampler,
    extractor: FeatureExtractor,
    reference: Reference,
    seeds: Tensor,
    sampling: dict[str, Any],
    name: str,
) -> None:
    """At the first use of a fast extractor, measure how far its Frechet distance is from the exact one, print and keep it.

    Both distances are those of the images of the same seeds (n,) to one reference. Every rank must call it.
    """
    if getattr(extractor, "exact", None) is None or extractor.shift is not None:
        return
    rows, _ = sample_features(sample, _ExtractorPair(extractor), seeds, **sampling)
    fast, exact = (_frechet(part, reference) for part in rows.split(extractor.dim, dim=1))
    extractor.shift = fast - exact
    if rank_and_world()[0] == 0:
        print(
            f"{extractor.name}: {printed_metric('fid', extractor)} of {len(seeds)} samples of {name} is {exact:.5g} in float32, "
            f"{fast:.5g} with it: a shift of {extractor.shift:+.2g}",
            flush=True,
        )


def _frechet(rows: Tensor, reference: Reference) -> float:
    gaussian = RunningGaussian(rows.shape[1], rows.device).update(rows)
    return frechet_distance(gaussian.mean, gaussian.cov, reference.mu, reference.cov).item()


def needs_real_features(metrics: Sequence[str]) -> bool:
    """Whether the reference has to keep the features of all real images."""
    return bool(_NEED_REAL_FEATURES.intersection(metrics))


def needs_held_out(metrics: Sequence[str]) -> bool:
    """Whether the reference has to keep the features of real images that no training sees."""
    return "memorisation" in metrics


def split_real_images(total: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Split the indices of `total` real images: those (num_samples,) that w2 and mmd compare with, and all others."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:num_samples], order[num_samples:]


def check_evaluation(
    metrics: Sequence[str], num_samples: int, blocks: int, batch_size: int, owner: str = "evaluation"
) -> None:
    """Refuse settings before an hour of training or sampling that would fail after it.

    Args:
        metrics: some of `METRICS`.
        num_samples: of each block.
        blocks: how many.
        batch_size: images that are sampled at once.
        owner: of the options, for messages.

    Raises:
        ValueError: naming the option.
    """
    if isinstance(metrics, str) or not metrics:
        raise ValueError(
            f"{owner}.metrics must be a list of some of {', '.join(METRICS)}, got {metrics!r}; {NO_WEIGHTS_ADVICE}"
        )
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise ValueError(f"metrics {', '.join(map(str, unknown))} are unknown; choose among {', '.join(METRICS)}")
    for option, value, least in (
        ("num_samples", num_samples, 10),
        ("blocks", blocks, 1),
        ("batch_size", batch_size, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(
                f"{owner}.{option} must be a whole number of at least {least}, got {value!r}; {NO_WEIGHTS_ADVICE}"
            )
    if num_samples * blocks > MONITOR_SEEDS:
        counts = f"{owner}.num_samples={num_samples}" + (f" in blocks={blocks}" if blocks > 1 else "")
        raise ValueError(f"{counts} are more than the {MONITOR_SEEDS:,} seeds that there are for them; lower them")
    if "w2" in metrics and num_samples > MAX_W2_SAMPLES:
        raise ValueError(
            f"w2 takes at most {MAX_W2_SAMPLES} samples, got num_samples={num_samples}; lower it or leave out w2"
        )


def check_feature_memory(dim: int, num_samples: int, blocks: int, has_images: bool) -> None:
    """Refuse numbers of samples whose features (N, dim), with those of the real images, do not fit into memory.

    Raises:
        ValueError: naming the options to lower.
    """
    together = num_samples * (blocks if has_images else 1)
    options = f"evaluation.num_samples={num_samples}" + (f" in blocks={blocks}" if has_images else "")
    check_memory(
        2 * 4 * dim * together, f"{options} (lower them): features of {together:,} images"
    )  # float32, and in parts


def check_real_images(metrics: Sequence[str], total: int, num_samples: int) -> None:
    """Refuse metrics that need more real images than `total`, the number that there is.

    Raises:
        ValueError: naming the metrics.
    """
    least = {metric: MIN_REAL_IMAGES[metric] for metric in metrics if metric in MIN_REAL_IMAGES}
    if least and total < max(least.values()):
        needy = max(least, key=least.__getitem__)
        raise ValueError(
            f"{needy} compares with {least[needy]} real images at least, and the data set has {total}: give more "
            f"images, leave it out of evaluation.metrics, or train without a measurement (evaluation=none)"
        )
    if (halves := _NEED_EQUAL_COUNTS.intersection(metrics)) and total < 2 * num_samples:
        raise ValueError(
            f"{', '.join(sorted(halves))} compare with as many real images, and their floor with as many others: "
            f"num_samples={num_samples} is more than half of the {total} real ones"
        )


def check_held_out(metrics: Sequence[str], held_out: PackedImages | Tensor | None) -> None:
    """Refuse metrics that compare with real images that no training sees, where there are none.

    Raises:
        ValueError: naming the metric.
    """
    if needs_held_out(metrics) and held_out is None:
        raise ValueError(
            "memorisation compares with real images that no training sees, and this data set has none: leave it out of "
            "evaluation.metrics, or take one that has, such as data=fashion_mnist"
        )


def check_real_features(metrics: Sequence[str]) -> None:
    """Refuse metrics that compare with the features of each real image where there are only their mean and covariance.

    Raises:
        ValueError: naming the metrics.
    """
    if refused := _NEED_REAL_FEATURES.intersection(metrics):
        raise ValueError(
            f"{', '.join(sorted(refused))} compare with the features of all real images, and this reference has only their "
            "mean and covariance; leave them out of the metrics, or set evaluation.reference=null and have the images"
        )


def _check(
    metrics: Sequence[str],
    reference: Reference,
    extractor: FeatureExtractor,
    num_samples: int,
    blocks: int,
    batch_size: int,
) -> None:
    check_evaluation(metrics, num_samples, blocks, batch_size)
    if len(reference.mu) != extractor.dim:
        raise ValueError(
            f"the reference has {len(reference.mu)} features, the {extractor.name} extractor {extractor.dim}; "
            "use statistics made by this extractor"
        )
    if reference.features is None:
        check_real_features(metrics)
    check_held_out(metrics, reference.held_out)
    if reference.features is not None:
        check_real_images(metrics, len(reference.features), num_samples)
    if not (reference.mu.isfinite().all() and reference.cov.isfinite().all()):
        raise ValueError(
            "the statistics of the real images contain NaN or infinity: make or fetch them again (evaluation.reference, or "
            "data/statistics)"
        )


def printed_metric(metric: str, extractor: FeatureExtractor) -> str:
    """The name of a metric with its features: fid_digits, fd_pixels, and plain fid for Inception's alone."""
    name = getattr(extractor, "frechet_name", metric) if metric == "fid" else metric
    return name + extractor.metric_suffix


def _scores(
    rows: Tensor,
    reference: Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str],
    own: Tensor | None = None,
) -> dict[str, float]:
    """own: of real images, their places among those held out."""
    scores = {}
    if "fid" in metrics:
        scores["fid"] = torch.tensor(_frechet(rows, reference), dtype=torch.float64)
    if "kid" in metrics:
        scores["kid"] = kernel_distance(rows, reference.features).mean()
    if {"precision", "recall"}.intersection(metrics):
        scores["precision"], scores["recall"] = precision_recall(rows, reference.features, radii=reference.radii)
    if "memorisation" in metrics:
        scores["memorisation"] = memorised_share(rows, reference.features, reference.held_out, own)
    if _NEED_EQUAL_COUNTS.intersection(metrics):
        chosen = split_real_images(len(reference.features), len(rows))[0]
        real = reference.features[chosen.to(rows.device)]
        if "w2" in metrics:
            scores["w2"] = torch.tensor(wasserstein_distance(rows.cpu(), real.cpu()))
        if "mmd" in metrics:
            scores["mmd"] = gaussian_kernel_distance(rows, real)
    if "is" in metrics:
        scores["is"] = inception_score(extractor.class_logits(rows)).mean()
    return {metric: scores[metric].item() for metric in metrics}


def _fingerprint(
    extractor: FeatureExtractor,
    reference: Reference,
    num_samples: int,
    blocks: int,
    labels: dict[str, Any],
    weights: str | None,
    precision: str,
    first_seed: int,
) -> dict[str, object]:
    return {
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "reference": reference.hash,
        "num_samples": num_samples,
        "seeds": [first_seed, first_seed + blocks * num_samples - 1],
        "labels": describe_labels(**labels),
        "uint8": UINT8_RULE,
        "precision": precision,
        "weights": weights,
    }


def _records(
    values: list[dict[str, float]],
    extractor: FeatureExtractor,
    fingerprint: dict[str, object],
    name: str,
    subject: str,
    nfe: int,
    rate: float | None,
    how: dict[str, object],
) -> list[Record]:
    records = []
    for metric in values[0]:
        series = [block[metric] for block in values]
        std = statistics.stdev(series) if len(series) > 1 else None
        printed = printed_metric(metric, extractor)
        mean = statistics.fmean(series)
        shift = getattr(extractor, "shift", None) if metric == "fid" else None
        records.append(Record(name, printed, subject, nfe, mean, std, series, rate, fingerprint, **how, shift=shift))
    return records

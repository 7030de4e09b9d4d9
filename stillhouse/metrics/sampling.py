"""Features of the samples of given seeds."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.metrics.extractors import FeatureExtractor
from stillhouse.metrics.images import to_uint8
from stillhouse.ranks import gather_rows, max_over_ranks, progress_bar, rank_slice

Sampler = Callable[[Tensor, Tensor | None], Tensor]


def sample_features(
    sample: Sampler,
    extractor: FeatureExtractor,
    seeds: Tensor,
    *,
    shape: Sequence[int],
    num_classes: int,
    batch_size: int,
    device: torch.device | str,
    class_counts: Sequence[int] | None = None,
    label: str | None = None,
) -> tuple[Tensor, float]:
    """Sample the images of given seeds and extract their features.

    Each rank works on a contiguous part and all get the whole, so that batch size and number of processes change no value
    beyond float rounding.

    Args:
        sample: a function of (noise, labels).
        extractor: of features.
        seeds: (n,), int64.
        shape: (C, H, W) of the noise.
        num_classes: of the labels; 0: there are none.
        batch_size: images that are sampled at once.
        device: to compute on.
        class_counts: as in `sample_labels`.
        label: names a progress bar.

    Returns:
        Features (n, D) in the order of `seeds`, and the seconds spent in `sample` alone, of the slowest rank: by CUDA events,
        without waiting for the device between batches, or by the clock on a CPU.

    Raises:
        ValueError: on every rank, where samples contain NaN or infinity.
    """
    device = torch.device(device)
    extractor = extractor.to(device)
    mine = seeds[rank_slice(len(seeds))].to(device)
    clock = _CudaClock() if device.type == "cuda" else _Clock()
    rows = [torch.zeros(0, extractor.dim, device=device)]
    with torch.no_grad(), progress_bar(len(mine), label) as bar:
        for noise, labels in sampler_inputs(mine, shape, num_classes, batch_size, class_counts):
            with clock:
                images = sample(noise, labels)
            finite = images.isfinite().flatten(1).all(dim=1, keepdim=True)
            with torch.autocast(device.type, enabled=False):
                # A byte cannot be NaN: without this mark a diverged sampler would be measured as one of black images.
                rows.append(torch.where(finite, extractor(to_uint8(images)), torch.nan))
            bar.update(len(noise))
    gathered = gather_rows(torch.cat(rows), len(seeds))
    diverged = int(gathered.isnan().any(dim=1).sum())
    if diverged:
        raise ValueError(f"{diverged} of {len(seeds)} samples contain NaN or infinity: the sampler has diverged")
    return gathered, max_over_ranks(clock.seconds(), device)


def sampler_inputs(
    seeds: Tensor,
    shape: Sequence[int],
    num_classes: int,
    batch_size: int,
    class_counts: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Noise (b, *shape) and labels (b,) of the seeds (n,), int64, in batches on their device."""
    for part in seeds.split(batch_size) if len(seeds) else ():
        yield sample_noise(part, shape), sample_labels(part, num_classes, class_counts)


class _Clock:
    """Seconds spent inside its with blocks."""

    def __init__(self):
        self._total = 0.0

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_: object):
        self._total += time.perf_counter() - self._start

    def seconds(self) -> float:
        return self._total


class _CudaClock:
    """Seconds of the device spent inside its with blocks; the device is waited for once, in `seconds`."""

    def __init__(self):
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self):
        self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._pairs[-1][0].record()

    def __exit__(self, *_: object):
        self._pairs[-1][1].record()

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._pairs) / 1000

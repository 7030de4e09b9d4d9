"""Random numbers: sample i is a function of seed i alone, a training step of (seed, rank, step) alone.

The random numbers of a training sample are a function of (seed of the run, position in its sequence, stream), so several
processes train on exactly what one would.

Counter-based generation (Philox4x32-10, Salmon et al. 2011) makes the noise of every sample a pure function of its seed:
independent of batch size, process count and device, computed for the whole batch at once on the device that needs it.

Seeds 0 .. 2^31-1 belong to final evaluation, those from `MONITOR_SEEDS` on to measurements in training, by which a run may
be chosen. Training pairs start at `TRAIN_SEEDS`, held-out pairs at `HELD_OUT_SEEDS`, so no
student is measured on noise that it was trained on.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MONITOR_SEEDS = 1 << 31
TRAIN_SEEDS = 1 << 32
HELD_OUT_SEEDS = 2 << 32
_MASK = 0xFFFFFFFF


class RunKey(IntEnum):
    """Keys that are derived from a run's seed (`derive_seed`), each for random numbers apart from all others."""

    FLIPS = 1  # of a data set's images
    POSITIONS = 2  # of training samples: `TrainingStream`


class TrainingStream(IntEnum):
    """The independent random numbers of one training sample, at a position of a run's sequence.

    A method that needs further ones adds a name here; a number that is in use never changes.
    """

    UNIFORMS = 0  # labels and noise levels
    NORMALS = 1  # latents, and the noise of the compared images; the noise that a flow starts from
    GAN_NOISE = 2  # on generated images in front of a discriminator
    GAN_REAL_NOISE = 3  # on real images in front of a discriminator
    STEP_COUNT = 4  # the number of steps of a trajectory (SFD)
    FLOW_TIMES = 5
    AUGMENTATION_UNIFORMS = 6
    AUGMENTATION_NORMALS = 7


class SampleStream(IntEnum):
    """The independent random numbers of one generated sample, beside its latent noise, which is stream 0."""

    UNIFORM = 0xFFFFFFFE  # a choice that belongs to the sample
    LABEL = 0xFFFFFFFF


Word = Tensor | int
"""Of 32 bits: an int64 tensor with values in [0, 2^32), or one number for all."""


def philox(counter: Sequence[Word], key: Sequence[Word]) -> tuple[Word, Word, Word, Word]:
    """Generate four random 32-bit words per counter, by Philox4x32-10.

    Args:
        counter: four words, whose tensors broadcast against each other. Numbers cost a device nothing.
        key: two words.

    Returns:
        Four words; tensors unless all arguments are numbers.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ (c1 ^ k0), p1 & _MASK, (p0 >> 32 & _MASK) ^ (c3 ^ k1), p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def _words(seeds: Tensor, blocks: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds must be a 1-D int64 tensor, got {seeds.dtype} of shape {tuple(seeds.shape)}")
    seed = seeds[:, None]
    return philox((torch.arange(blocks, device=seeds.device), stream, 0, 0), (seed & _MASK, seed >> 32 & _MASK))


def sample_noise(seeds: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Generate unit normal noise of samples; row i is a function of (seeds[i], stream) alone.

    Args:
        seeds: (B,), int64.
        shape: of one sample.
        stream: 0 .. 2^32-3, numbers independent noise of the same sample, such as that of a stochastic solver's steps.

    Returns:
        (B, *shape), float32, on the device of the seeds.
    """
    size = math.prod(shape)
    return _normals(_words(seeds, -(-size // 4), stream), size).reshape(len(seeds), *shape)


def position_noise(seed: int, positions: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    """Generate unit normal noise of training samples; row i is a function of (seed, positions[i], stream) alone.

    It is independent of all that `sample_noise` generates.

    Args:
        seed: of a run.
        positions: places in the run's endless sequence of training samples, (B,), int64, not negative.
        shape: of one sample's noise.
        stream: of `TrainingStream`.

    Returns:
        (B, *shape), float32.
    """
    size = math.prod(shape)
    return _normals(_position_words(seed, positions, -(-size // 4), stream), size).reshape(len(positions), *shape)


def position_uniforms(seed: int, positions: Tensor, stream: int, count: int = 4) -> tuple[Tensor, ...]:
    """Generate uniform numbers of training samples, as `position_noise` does.

    Args:
        seed: of a run.
        positions: (B,), int64, not negative.
        stream: of `TrainingStream`.
        count: of independent numbers for each position.

    Returns:
        `count` tensors (B,), float64 in (0, 1).
    """
    words = torch.stack(_position_words(seed, positions, -(-count // 4), stream), dim=-1).flatten(1)
    return tuple((word.double() + 0.5) * 2.0**-32 for word in words[:, :count].unbind(1))


def _position_words(seed: int, positions: Tensor, blocks: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key = derive_seed(seed, RunKey.POSITIONS)
    position = positions[:, None]
    counter = (torch.arange(blocks, device=positions.device), stream, position & _MASK, position >> 32 & _MASK)
    return philox(counter, (key & _MASK, key >> 32))


def _normals(words: Sequence[Tensor], size: int) -> Tensor:
    """Turn four words (B, blocks) into normal numbers (B, size), float32."""
    # Box-Muller in double precision, so that devices agree after rounding to float32.
    u = [(w.double() + 0.5) * 2.0**-32 for w in words]
    pairs = [(torch.sqrt(-2 * torch.log(u[i])), 2 * math.pi * u[i + 1]) for i in (0, 2)]
    normals = [(f(angle) * radius).float() for radius, angle in pairs for f in (torch.cos, torch.sin)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size]


def sample_labels(seeds: Tensor, num_classes: int, class_counts: Sequence[int] | None = None) -> Tensor | None:
    """Choose class labels, one per seed.

    Args:
        seeds: (B,), int64.
        num_classes: 0 without classes.
        class_counts: images of each class in a data set: labels are distributed as there. None: uniformly.

    Returns:
        Labels (B,), int64 in [0, num_classes); None where there are no classes.
    """
    if not num_classes:
        return None
    word = _words(seeds, 1, SampleStream.LABEL)[0][:, 0]
    if class_counts is None:
        return (word * num_classes) >> 32
    ends = torch.tensor(class_counts).cumsum(0)
    return torch.searchsorted(ends.to(word.device, non_blocking=True), (word * sum(class_counts)) >> 32, right=True)


def sample_uniforms(seeds: Tensor) -> Tensor:
    """Generate a uniform number per seed, (B,), float64 in (0, 1), for a choice that belongs to the sample."""
    return (_words(seeds, 1, SampleStream.UNIFORM)[0][:, 0].double() + 0.5) * 2.0**-32


@lru_cache(maxsize=64)
def derive_seed(*numbers: int) -> int:
    """Derive a 63-bit seed from any tuple of non-negative integers; other tuples have other seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed torch's global generators (CPU and current CUDA device) for one training step of one process."""
    _seed_torch(derive_seed(seed, rank, step))


def _seed_torch(value: int) -> None:
    # torch.manual_seed asks after every kind of device, which takes a hundred times as long where there is none.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


class SharedMasks:
    """Equal dropout masks, and equally hidden labels, in several passes of a network: each block begins with the same state.

        masks = SharedMasks()
        with masks:
            output = student(x, t)
        with masks, torch.no_grad():
            target = student(y, r)

    The state of torch's global generators (CPU and current CUDA device) is made of a number that the CPU's one gives, so
    another object has other masks, a step that is repeated after `seed_step` the same ones, and no device is waited for.
    """

    def __init__(self) -> None:
        self._seed = int(torch.randint(2**63 - 1, (), device="cpu"))

    def __enter__(self) -> None:
        _seed_torch(self._seed)

    def __exit__(self, *exception: object) -> None:
        pass

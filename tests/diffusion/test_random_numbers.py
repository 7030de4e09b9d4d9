import numpy as np
import pytest
import torch
from scipy import stats

from stillhouse.diffusion.random_numbers import (
    SharedMasks,
    derive_seed,
    philox,
    position_noise,
    position_uniforms,
    sample_labels,
    sample_noise,
    seed_step,
)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with the generator (Random123, philox4x32-10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    result = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in result) == words


def test_noise_of_a_sample_depends_on_its_seed_alone():
    seeds = torch.tensor([7, 1 << 40, 0, 123456789])
    together = sample_noise(seeds, (3, 5, 5))
    for i, seed in enumerate(seeds):
        torch.testing.assert_close(sample_noise(seed[None], (3, 5, 5))[0], together[i], rtol=0, atol=0)
    # A smaller image is no prefix guarantee, but another stream must be other noise.
    assert not torch.equal(sample_noise(seeds, (3, 5, 5), stream=1), together)


def test_noise_is_standard_normal_and_independent():
    noise = sample_noise(torch.arange(2000), (1, 8, 8)).flatten(1).numpy()
    assert stats.kstest(noise.ravel()[:20000], "norm").pvalue > 0.01
    correlation = np.corrcoef(noise.T) - np.eye(64)
    assert np.abs(correlation).max() < 0.12  # 5 standard errors of 2000 draws
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.015


def test_labels_are_uniform_and_independent_of_the_noise():
    labels = sample_labels(torch.arange(20000), 10)
    counts = torch.bincount(labels, minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    noise = sample_noise(torch.arange(20000), (1, 1, 1)).flatten()
    assert stats.f_oneway(*[noise[labels == k].numpy() for k in range(10)]).pvalue > 0.01
    assert sample_labels(torch.arange(4), 0) is None


def test_steps_differ_by_seed_rank_and_step():
    draws = {}
    for seed in (0, 1):
        for rank in (0, 1):
            for step in (0, 1):
                seed_step(seed, rank, step)
                draws[seed, rank, step] = torch.randn(4)
    values = list(draws.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    seed_step(1, 0, 1)
    assert torch.equal(torch.randn(4), draws[1, 0, 1])
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_seeds_of_a_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="seeds must be a 1-D int64 tensor"):
        sample_noise(torch.zeros(3), (1,))


def test_noise_of_positions_is_normal_and_theirs_alone():
    positions = torch.arange(4000)
    noise = position_noise(3, positions, (2, 3), stream=1)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    part = torch.tensor([7, 3999, 12])
    assert torch.equal(position_noise(3, part, (2, 3), stream=1), noise[part])
    for seed, stream, shift in ((4, 1, 0), (3, 2, 0), (3, 1, 1 << 32)):
        assert (position_noise(seed, positions + shift, (2, 3), stream) != noise).float().mean() > 0.99
    assert (sample_noise(positions, (2, 3), stream=1) != noise).float().mean() > 0.99


def test_uniform_numbers_of_positions():
    four = torch.stack(position_uniforms(3, torch.arange(4000), stream=1))
    assert four.min() > 0
    assert four.max() < 1
    assert all(stats.kstest(u.numpy(), "uniform").pvalue > 0.01 for u in four)
    assert (torch.corrcoef(four) - torch.eye(4, dtype=torch.float64)).abs().max() < 0.06
    assert torch.equal(torch.stack(position_uniforms(3, torch.tensor([5]), 1)), four[:, 5:6])


def test_blocks_with_shared_masks_drop_the_same_features(monkeypatch):
    """Each object has masks of its own, a function of the step; a CUDA device is seeded and never asked."""
    seeded, dropout = [], torch.nn.Dropout(0.5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    x = torch.ones(4, 100)

    def step(number):
        seed_step(0, 0, number)
        passes = []
        for masks in (SharedMasks(), SharedMasks()):
            with masks:
                passes.append((dropout(x), torch.rand(3)))
            with masks, torch.no_grad():
                again = dropout(x), torch.rand(3)
            assert all(map(torch.equal, passes[-1], again))
        return passes

    first, other, repeated = step(0), step(1), step(0)
    values = [numbers for passes in (first, other) for _, numbers in passes]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert all(map(torch.equal, [n for _, n in first], [n for _, n in repeated]))
    assert len(seeded) == 15
    assert seeded[1:3] != seeded[3:5]
    assert seeded[1] == seeded[2] == seeded[11]

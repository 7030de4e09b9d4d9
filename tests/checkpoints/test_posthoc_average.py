"""Averages that are made of stored ones, against integrals and against averages that were kept from the beginning."""

import pytest
import pytorch_lightning as pl
import torch
from tiny_module import TinyMethod, trainer

from callbacks.ema import EMA, SNAPSHOTS
from stillhouse.checkpoints.posthoc_average import Profile, combination, inner_product, power_of_width, reconstructed

STORED = [Profile(t, power_of_width(width)) for t in (250, 500, 750, 1000) for width in (0.05, 0.1)]


def density(profile, s):
    inside = (profile.gamma + 1) * (s / profile.updates) ** profile.gamma / profile.updates
    return torch.where(s <= profile.updates, inside, 0.0)


def test_products_of_densities_are_their_integrals():
    s = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200
    for a, b in ((STORED[0], STORED[1]), (STORED[1], STORED[6]), (STORED[7], STORED[2])):
        integral = (density(a, s) * density(b, s)).sum().item() / 200
        assert inner_product(a, b) == pytest.approx(integral, rel=1e-3)


def test_factors_are_those_of_the_released_code():
    """`expected`: of phema.solve_posthoc_coefficients in NVlabs/edm2 (4bf8162)."""
    expected = [
        1.87017274e-08,
        -4.59398708e-07,
        8.35073935e-05,
        -0.000568048061,
        0.0106857393,
        -0.0439212356,
        0.43456714,
        0.599153337,
    ]
    factors, distance = combination(STORED, Profile(1000, power_of_width(0.07)))
    assert factors == pytest.approx(expected, rel=1e-6)
    assert distance == pytest.approx(0.0361, abs=1e-4)
    assert combination(STORED, STORED[5])[0] == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0], abs=1e-9)


def test_of_a_runs_snapshots_an_average_is_made_that_was_not_kept(tmp_path):
    """Beside the same average, kept all along; that of a snapshot is exact."""
    ema = EMA([{"sigma_rel": 0.05}, {"sigma_rel": 0.1}, {"sigma_rel": 0.07}], snapshots_kimg=0.05)
    module, generator = TinyMethod(), torch.Generator().manual_seed(0)

    class Drift(pl.Callback):  # weights that go somewhere, unlike those of a toy in training
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                for p in pl_module.student.parameters():
                    p.add_(0.01 * torch.randn(p.shape, generator=generator) + 0.003)

    trainer(tmp_path, 200, [Drift(), ema]).fit(module)
    folder = tmp_path / SNAPSHOTS
    assert len(list(folder.glob("*.safetensors"))) == 3 * (200 * module.batch_size // 50)
    for file in folder.glob("*0.07*"):
        file.unlink()
    state, distance = reconstructed(folder, 0.07)
    assert distance < 0.02
    for name, raw in module.student.named_parameters():
        kept = ema._values["ema_sigma_rel0.07"][name]
        assert (state[name] - kept).norm() < 0.02 * (raw - kept).norm()
    exact, distance = reconstructed(folder, 0.1)
    assert distance < 1e-6
    assert all(torch.allclose(exact[name], ema._values["ema_sigma_rel0.1"][name], atol=1e-5) for name in exact)


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match="snapshots_kimg is for averages by power rules.*sigma_rel: 0.05"):
        EMA([{"decay": 0.9}], snapshots_kimg=1)
    with pytest.raises(ValueError, match="snapshots_kimg must be positive or null, got 0"):
        EMA([{"gamma": 7.0}], snapshots_kimg=0)
    with pytest.raises(ValueError, match="holds 0 averages, too few .* train with callbacks.ema.snapshots_kimg"):
        reconstructed(tmp_path, 0.05)
    with pytest.raises(ValueError, match=r"lies in \(0, 0.2887\], got 0.5"):
        reconstructed(tmp_path, 0.5)

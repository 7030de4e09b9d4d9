import json

import numpy as np
import pytest
import torch

from datamodules.plane_points import DISTRIBUTIONS, PlanePoints, checkerboard, eight_gaussians

COUNT = 20_000


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def module(request, tmp_path_factory):
    module = PlanePoints(request.param, root=str(tmp_path_factory.mktemp("data")), batch_size=8, points=COUNT)
    module.prepare_data()
    return module


def test_modes_lie_on_the_circle_alike_often_and_have_their_spread():
    points = eight_gaussians(COUNT, generator())
    angles = np.arange(8) * np.pi / 4
    means = 0.7 * np.stack([np.cos(angles), np.sin(angles)], 1)
    mode = np.linalg.norm(points[:, None] - means, axis=2).argmin(1)
    errors = 4 * np.sqrt(0.05**2 / (COUNT / 8))  # four standard deviations of a mean
    for k in range(8):
        members = points[mode == k]
        assert abs(len(members) - COUNT / 8) < 4 * np.sqrt(COUNT * 7 / 64)
        assert np.abs(members.mean(0) - means[k]).max() < errors
        assert members.std(0) == pytest.approx([0.05, 0.05], rel=0.06)


def test_the_dark_squares_alone_are_filled_and_alike_often():
    points = checkerboard(COUNT, generator())
    assert np.abs(points).max() <= 0.9
    column, row = np.floor((points + 0.9) / 0.45).astype(int).T
    assert ((column + row) % 2 == 0).all()
    counts = np.bincount(4 * row + column, minlength=16)
    assert (counts > 0).sum() == 8
    assert np.abs(counts[counts > 0] - COUNT / 8).max() < 4 * np.sqrt(COUNT * 7 / 64)
    within = (points + 0.9) % 0.45 / 0.45
    assert within.mean(0) == pytest.approx([0.5, 0.5], abs=4 / np.sqrt(12 * COUNT))
    assert within.std(0) == pytest.approx([12**-0.5] * 2, rel=0.02)


def test_bytes_are_the_distributions_points_on_the_lattice(module):
    packed = module.reference()
    assert packed.images.shape == (COUNT, 2, 1, 1)
    points = DISTRIBUTIONS[module.distribution](COUNT, generator(2025))
    expected = np.clip(np.floor(points * 127.5 + 128), 0, 255)
    # The house's rule rounds in float32: next to an integer that is the other side.
    assert (packed.images[:, :, 0, 0] != expected).mean() < 1e-3
    errors = packed.images[:, :, 0, 0] / 127.5 - 1 - points
    assert np.abs(errors).max() <= 0.5 / 127.5 + 1e-6
    assert abs(errors.mean()) < 1e-4
    assert json.loads((module.folder / "meta.json").read_text())["name"] == module.distribution
    packed.verify()


def test_bytes_are_the_same_everywhere(tmp_path):
    """The hash in every fingerprint: measured values can be compared between machines."""
    hashes = [
        PlanePoints(distribution, root=str(tmp_path), batch_size=1).reference().hash[:8]
        for distribution in DISTRIBUTIONS
    ]
    assert hashes == ["e482520d", "06818ccf"]


def test_batches_are_points_in_data_range_without_labels(module):
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert set(batch) == {"image", "position"}
    assert batch["image"].shape == (8, 2, 1, 1)
    assert batch["image"].abs().max() <= 1
    assert module.num_classes == 0
    assert torch.equal(
        module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)["image"], batch["image"]
    )


def test_the_runs_seed_orders_the_points_and_does_not_draw_them(module):
    other = PlanePoints(module.distribution, root=str(module.folder.parent), batch_size=8, points=COUNT, seed=5)
    assert other.reference().hash == module.reference().hash
    first, second = (next(iter(m.train_dataloader()))["image"] for m in (module, other))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "moons"}, "distribution must be one of eight_gaussians, checkerboard, got 'moons'"),
        ({"points": 0}, "points must be an integer of at least 1, got 0"),
        ({"points": 77}, "points=77, but .* was packed with 20000; correct the option or set another name or root"),
        ({"channels": 3}, "channels=3, but .* was packed with 2"),
        ({"num_classes": 8}, "num_classes=8, but"),
    ],
)
def test_misuse(module, options, message):
    options = {"distribution": module.distribution, "points": COUNT, **options}
    with pytest.raises(ValueError, match=message):
        PlanePoints(root=str(module.folder.parent), name=module.name, batch_size=8, **options).setup("fit")


def test_another_distribution_under_the_name_is_refused(module):
    other = next(distribution for distribution in DISTRIBUTIONS if distribution != module.distribution)
    with pytest.raises(ValueError, match=f"distribution={other}, but .* was packed with {module.distribution}"):
        PlanePoints(other, module.name, str(module.folder.parent), batch_size=8, points=COUNT).reference()

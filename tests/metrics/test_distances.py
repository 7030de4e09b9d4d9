import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

import stillhouse.metrics.distances
from stillhouse.metrics.distances import (
    BANDWIDTHS,
    frechet_distance,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from stillhouse.metrics.statistics import RunningGaussian


def rows(count, dim=8, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, dim, generator=generator) @ mixing + shift


def moments(features):
    gaussian = RunningGaussian(features.shape[1]).update(features)
    return gaussian.mean, gaussian.cov


class Pixels(torch.nn.Module):
    """A feature extractor for torchmetrics: the first eight pixels."""

    num_features = 8

    def forward(self, images):
        return images.flatten(1)[:, :8].float() / 16


def images(count, seed, scale=60):
    generator = torch.Generator().manual_seed(seed)
    return (128 + scale * torch.randn(count, 3, 4, 4, generator=generator)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("smallest", "tolerance"), [(0.5, 1e-12), (0, 1e-8)])
def test_frechet_distance_of_gaussians_with_commuting_covariances_is_the_closed_form(smallest, tolerance):
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    a, b = torch.tensor([4.0, 1, 0.25, 9, smallest, 2]), torch.tensor([1.0, 1, 4, smallest, smallest, 3])
    a, b, mu1, mu2 = a.double(), b.double(), torch.arange(6).double(), torch.ones(6).double()
    expected = (mu1 - mu2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    value = frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)


def test_frechet_distance_of_general_covariances_matches_a_matrix_root_and_torch_fidelity():
    (mu1, cov1), (mu2, cov2) = moments(rows(300)), moments(rows(200, seed=1, shift=0.5) ** 2)
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    expected = float(((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root.real))
    fidelity = fid_statistics_to_metric(
        {"mu": mu1.numpy(), "sigma": cov1.numpy()}, {"mu": mu2.numpy(), "sigma": cov2.numpy()}, False
    )
    value = frechet_distance(mu1, cov1, mu2, cov2).item()
    assert value == pytest.approx(expected, rel=1e-9)
    assert value == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-9)
    assert frechet_distance(mu2, cov2, mu1, cov1).item() == pytest.approx(value, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions_matches_torch_fidelity():
    (mu1, cov1), (mu2, cov2) = moments(rows(10, dim=24)), moments(rows(12, dim=24, seed=1))
    fidelity = fid_statistics_to_metric(
        {"mu": mu1.numpy(), "sigma": cov1.numpy()}, {"mu": mu2.numpy(), "sigma": cov2.numpy()}, False
    )
    value = frechet_distance(mu1, cov1, mu2, cov2).item()
    assert value == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-6)
    assert frechet_distance(mu1, cov1, mu1, cov1).item() == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_images_matches_torchmetrics():
    real, fake = images(120, 0), images(90, 1, scale=40)
    metric = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    value = frechet_distance(*moments(Pixels()(fake)), *moments(Pixels()(real)))
    assert value.item() == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("broken", "message"), [(torch.full((8,), torch.nan), "NaN"), (torch.zeros(5), "5 features; they must come")]
)
def test_frechet_distance_refuses(broken, message):
    mu, cov = moments(rows(20))
    with pytest.raises(ValueError, match=message):
        frechet_distance(mu, cov, broken, cov)


@pytest.mark.filterwarnings("ignore:Metric")
def test_kernel_distance_matches_torch_fidelity_and_torchmetrics_on_whole_sets():
    real, fake = images(60, 0), images(60, 1, scale=40)
    x, y = Pixels()(fake), Pixels()(real)
    value = kernel_distance(x, y, subsets=2, subset_size=60)
    fidelity = kid_features_to_metric(x, y, kid_subsets=2, kid_subset_size=60, verbose=False)
    metric = KernelInceptionDistance(feature=Pixels(), subsets=2, subset_size=60)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert value.shape == (2,)
    assert value.mean().item() == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-4)
    assert value.mean().item() == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_kernel_distance_of_subsets_is_unbiased_and_seeded():
    x, y = rows(400, seed=1) / 3, rows(300, seed=2) / 3
    whole = kernel_distance(x[:300], y, subsets=1).item()
    parts = kernel_distance(x[:300], y, subsets=400, subset_size=50)
    assert parts.std() > 0
    assert abs(parts.mean().item() - whole) < 4 * parts.std().item() / 400**0.5
    assert torch.equal(parts, kernel_distance(x[:300], y, subsets=400, subset_size=50))
    assert not torch.equal(parts, kernel_distance(x[:300], y, subsets=400, subset_size=50, seed=1))
    with pytest.raises(ValueError, match="at least 2 samples on each side, got 1, 300"):
        kernel_distance(x[:1], y)


@pytest.mark.parametrize("entries", [1 << 26, 700])
def test_precision_and_recall_match_torch_fidelity_whatever_the_slabs(monkeypatch, entries):
    monkeypatch.setattr(stillhouse.metrics.distances, "_ENTRIES", entries)
    fake, real = rows(150, seed=1, shift=1.5), rows(130, seed=2)
    expected = prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=3, verbose=False)
    precision, recall = precision_recall(fake, real)
    assert precision.item() == pytest.approx(expected["precision"], abs=1e-6)
    assert recall.item() == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < precision < 1
    assert precision != recall


def test_precision_and_recall_tell_poor_quality_from_missing_modes():
    real = torch.cat([rows(60, seed=1), rows(60, seed=2, shift=100)])
    dropped = torch.cat([rows(60, seed=3), rows(60, seed=4)])
    precision, recall = precision_recall(dropped, real)
    assert precision > 0.7
    assert 0.3 < recall < 0.55
    with pytest.raises(ValueError, match="3 neighbours need more samples than that on each side, got 3 and 120"):
        precision_recall(real[:3], real)


@pytest.mark.filterwarnings("ignore:Metric", "ignore:std")
def test_inception_score_matches_torch_fidelity_and_torchmetrics():
    pictures = images(103, 0)
    logits = Pixels()(pictures)
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)
    scores = inception_score(logits)
    assert scores.mean().item() == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert scores.std(correction=0).item() == pytest.approx(expected["inception_score_std"], rel=1e-9)
    metric = InceptionScore(feature=Pixels(), splits=1)
    metric.update(pictures)
    assert inception_score(logits, splits=1).item() == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_inception_score_bounds():
    sure = 1000 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=2).tolist() == pytest.approx([5, 5])
    assert inception_score(torch.zeros(20, 5), splits=2).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="10 splits needs at least as many samples, got 9"):
        inception_score(torch.zeros(9, 5))


def test_gaussian_kernel_distance_is_that_of_a_double_loop(monkeypatch):
    x, y = (0.4 * rows(n, 2, seed) for seed, n in enumerate((9, 12)))

    def kernel(a, b):
        return np.mean([np.exp(-float((a.double() - b.double()).square().sum()) / (2 * h * h)) for h in BANDWIDTHS])

    def mean(left, right, same):
        values = [kernel(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if not (same and i == j)]
        return sum(values) / len(values)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    value = gaussian_kernel_distance(x, y)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(stillhouse.metrics.distances, "_ENTRIES", 30)  # slabs of two rows
    assert gaussian_kernel_distance(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_gaussian_kernel_distance_has_no_bias_and_sees_a_shift():
    """Of one law its mean over pairs of sets is zero, where the biased one would be 1/50 * (1 - E k) * 2."""
    sets = torch.rand(400, 50, 2, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    values = torch.stack([gaussian_kernel_distance(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)])
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    assert values.std() < 0.01
    assert gaussian_kernel_distance(sets[0], sets[1] + 0.5) > 0.03
    with pytest.raises(ValueError, match="at least 2 samples on each side, got 1 and 50"):
        gaussian_kernel_distance(sets[0, :1], sets[1])

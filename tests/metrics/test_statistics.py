import numpy as np
import pytest
import torch

from stillhouse.metrics.statistics import RunningGaussian, load_statistics, save_statistics


def rows(count=500, dim=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, generator=generator) * torch.arange(1, dim + 1) + 30


def test_running_statistics_are_those_of_all_rows():
    x = rows()
    running = RunningGaussian(6)
    for part in x.split(37):
        running.update(part)
    assert running.count == 500
    torch.testing.assert_close(running.mean, x.double().mean(dim=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(running.cov, x.double().T.cov(), rtol=1e-10, atol=1e-10)


def test_running_statistics_accumulate_in_float64():
    x = rows().double() + 30_000  # in float32 the spread of 1 to 6 would drown
    running = RunningGaussian(6)
    for part in x.split(50):
        running.update(part)
    torch.testing.assert_close(running.cov, x.T.cov(), rtol=1e-5, atol=1e-5)


def test_too_few_rows_are_refused():
    running = RunningGaussian(3)
    with pytest.raises(ValueError, match="at least 1 rows of features, got 0"):
        _ = running.mean
    running.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 rows of features, got 1"):
        _ = running.cov


def test_reference_file_round_trip_and_edm_format(tmp_path):
    running = RunningGaussian(6).update(rows())
    path = tmp_path / "new" / "reference.npz"
    save_statistics(path, running.mean, running.cov)
    mu, cov = load_statistics(path)
    assert torch.equal(mu, running.mean)
    assert torch.equal(cov, running.cov)
    with np.load(path) as file:  # as EDM's fid.py reads it
        assert set(file) == {"mu", "sigma"}
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
    np.savez(tmp_path / "edm.npz", mu=running.mean.numpy(), sigma=running.cov.numpy())  # as it writes it
    assert torch.equal(load_statistics(tmp_path / "edm.npz")[1], running.cov)
    assert list(path.parent.iterdir()) == [path]


def test_bad_reference_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no reference statistics at .*none\.npz; give the path"):
        load_statistics(tmp_path / "none.npz")
    path = tmp_path / "bad.npz"
    save_statistics(path, torch.zeros(4), torch.eye(4))
    whole = path.read_bytes()
    hostile = tmp_path / "pickle.npz"
    np.savez(hostile, mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4))
    for content in (whole[: len(whole) // 2], b"", b"not an archive", hostile.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz is damaged or holds no reference statistics"):
            load_statistics(path)
    with pytest.raises(ValueError, match=r"other\.npz is damaged or holds no .*sigma"):
        load_statistics(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(4), np.eye(5), r"mu \(4,\) and sigma \(5, 5\) are no mean \(D,\) and covariance \(D, D\)"),
        (np.zeros((2, 2)), np.eye(2), r"mu \(2, 2\) and sigma \(2, 2\) are no mean"),
        (np.full(2, np.nan), np.eye(2), "values of mu or sigma are not finite"),
        (np.zeros(2), np.diag([1.0, np.inf]), "values of mu or sigma are not finite"),
        (np.zeros(2), np.eye(2) * 1j, "sigma holds values of the kind complex128 instead of real numbers"),
        (np.zeros(2, bool), np.eye(2), "mu holds values of the kind bool"),
        (np.zeros(2), np.diag([1.0, -0.01]), "sigma is no covariance, the variance is negative in some direction"),
        (np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), "the variance is negative in some direction"),
        (np.zeros(2), -np.eye(2), "sigma is not symmetric, or has negative variances"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "sigma is not symmetric"),
    ],
)
def test_statistics_that_no_images_can_have_are_refused(tmp_path, mu, sigma, message):
    np.savez(tmp_path / "bad.npz", mu=mu, sigma=sigma)
    with pytest.raises(
        ValueError, match=f"bad.npz is damaged or holds no reference statistics.*{message}.*; delete it"
    ):
        load_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize("dim", [1, 30, 64])
def test_covariances_of_few_or_equal_images_are_no_damage(tmp_path, dim):
    """Of rank 9 and 0, hence with variances that are negative by rounding."""
    for values in (rows(10, dim), 300 + rows(10, dim), torch.ones(10, dim)):
        running = RunningGaussian(dim).update(values)
        save_statistics(tmp_path / "a.npz", running.mean, running.cov)
        assert torch.equal(load_statistics(tmp_path / "a.npz")[1], running.cov)


def test_statistics_say_what_they_are_of(tmp_path):
    save_statistics(tmp_path / "a.npz", torch.zeros(2), torch.eye(2), "extractor A, images B")
    load_statistics(tmp_path / "a.npz", "extractor A, images B")
    with pytest.raises(ValueError, match="a.npz is damaged .*it was made of other images or by another extractor"):
        load_statistics(tmp_path / "a.npz", "extractor A, images C")
    content = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **content | {"mu": content["mu"] + 1})
    with pytest.raises(ValueError, match="a.npz is damaged .*its numbers have changed: they do not have its SHA-256"):
        load_statistics(tmp_path / "a.npz", "extractor A, images B")
    save_statistics(tmp_path / "a.npz", torch.zeros(2), torch.eye(2))  # as EDM's, and ours of earlier versions
    load_statistics(tmp_path / "a.npz", "extractor A, images B")

import pytest
import torch
from scipy import stats

from stillhouse.diffusion.noise_levels import KarrasGrid, KarrasUniform, LogNormal, TruncatedStudentT
from stillhouse.diffusion.schedules import karras

U = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000


def test_log_normal_has_edms_distribution():
    """Against the standard library's normal distribution, at its own quantiles."""
    sigma = LogNormal(-1.2, 1.2)(U)
    normal = torch.distributions.Normal(-1.2, 1.2)
    torch.testing.assert_close(normal.cdf(sigma.double().log()), U, rtol=0, atol=1e-5)
    assert sigma.dtype == torch.float32


def test_karras_grid_is_edms_schedule_read_from_below():
    """All levels: those of the sampling schedule; a part: each of its entries as often as any other."""
    levels = karras(1000).flip(0)[1:].float()
    torch.testing.assert_close(KarrasGrid(first=0, last=999)(U), levels.repeat_interleave(10), rtol=1e-5, atol=0)
    part = KarrasGrid(first=20, last=980)(U)
    torch.testing.assert_close(part.unique(), levels[20:981], rtol=1e-5, atol=0)
    counts = part.unique(return_counts=True)[1]
    assert counts.min() >= 10
    assert counts.max() <= 11


def test_karras_uniform_has_the_levels_of_the_schedule_at_its_places():
    places = torch.linspace(1, 0, 1000, dtype=torch.float64)
    torch.testing.assert_close(KarrasUniform()(places), karras(1000)[:-1].float(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max, got 1.0 and 0.5"):
        KarrasUniform(1.0, 0.5)
    with pytest.raises(ValueError, match="rho must be positive, got 0"):
        KarrasUniform(rho=0)


@pytest.mark.parametrize(("mean", "scale", "df", "low", "high"), [(0, 0.2, 0.01, 1, 80), (-1.1, 2.0, 3.0, 0.002, 80)])
def test_student_t_is_scipys_between_its_ends(mean, scale, df, low, high):
    sigma = TruncatedStudentT(mean, scale, df, low, high)(U)
    t = stats.t(df, mean, scale)
    ends = t.cdf(torch.tensor([low, high]).double().log().numpy())
    cdf = torch.from_numpy((t.cdf(sigma.double().log().numpy()) - ends[0]) / (ends[1] - ends[0]))
    torch.testing.assert_close(cdf, U, rtol=0, atol=2e-5)
    assert sigma.dtype == torch.float32
    assert low <= sigma.min() <= sigma.max() <= high * (1 + 1e-6)


@pytest.mark.parametrize(
    ("distribution", "options", "message"),
    [
        (LogNormal, {"std": 0}, "a log-normal distribution needs a positive std, got 0"),
        (TruncatedStudentT, {"scale": 0}, "needs a positive scale and df, got 0 and 0.01"),
        (TruncatedStudentT, {"sigma_min": 80}, "need 0 < sigma_min < sigma_max, got 80 and 80"),
        (KarrasGrid, {"sigma_min": 0}, "need 0 < sigma_min < sigma_max, got 0 and 80.0"),
        (KarrasGrid, {"last": 1000}, "need 0 <= first <= last < levels=1000, got 20 and 1000"),
        (KarrasGrid, {"levels": 1}, "levels must be an integer of at least 2, got 1"),
    ],
)
def test_misuse(distribution, options, message):
    usual = {"mean": 0, "scale": 0.2, "df": 0.01, "sigma_min": 1, "sigma_max": 80}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        distribution(**(usual | options if distribution is TruncatedStudentT else options))

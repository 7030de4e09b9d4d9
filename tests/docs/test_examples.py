"""The complete files of docs/examples do what the pages of docs/extending say; the commands beside them are run as all others."""

import pytest
import torch

from benchmarks.measuring import ROOT
from stillhouse.metrics.distances import frechet_distance

EXAMPLES = ROOT / "docs/examples"


def gaussian(features):
    return features.mean(0).double(), features.T.double().cov()


def test_a_spectrum_is_blind_to_places_and_sees_blur(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "add_a_metric")
    from spectrum import Spectrum

    extractor = Spectrum(bins=4)
    images = torch.randint(0, 256, (400, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = extractor(images)
    assert features.shape == (400, extractor.dim)
    torch.testing.assert_close(extractor(images.roll((3, 5), (2, 3))), features)
    # White noise of variance s^2 has power s^2 at every frequency: of a mean over three colours a third of one's.
    variance = (images.double() / 127.5 - 1).var() / 3
    assert features[:, 1:].exp().mean() == pytest.approx(variance.item(), rel=0.05)
    blurred = images.float().unfold(2, 3, 1).mean(-1).unfold(3, 3, 1).mean(-1).to(torch.uint8)
    statistics = [gaussian(one) for one in (features[:200], features[200:], extractor(blurred))]
    assert frechet_distance(*statistics[0], *statistics[2]) > 20 * frechet_distance(*statistics[0], *statistics[1])
    with pytest.raises(ValueError, match=r"lower evaluation\.extractor\.bins"):
        extractor(images[..., :6, :6])
    with pytest.raises(ValueError, match="bins must be 2 or more"):
        Spectrum(1)

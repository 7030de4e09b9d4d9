"""The complete files of docs/examples do what the pages of docs/extending say; the commands beside them are run as all others."""

import pytest
import torch

from benchmarks.measuring import ROOT
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.metrics.distances import frechet_distance
from stillhouse.networks import widen

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


def test_a_network_of_ones_own_is_what_denoisers_and_methods_ask_for(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "add_a_teacher")
    from residual_net import ResidualNet

    network = ResidualNet(8, 1, 1, num_classes=10, width=8, num_blocks=1).eval()
    denoiser = Denoiser(network, EDM(0.5))
    x, sigma, labels = torch.randn(6, 1, 8, 8), torch.full((6,), 0.7), torch.arange(6)
    with torch.no_grad():
        together = denoiser(x, sigma, labels)
        alone = denoiser(x[2:3], sigma[2:3], labels[2:3])
        torch.testing.assert_close(together[2:3], alone)
        assert not torch.allclose(together, denoiser(x, sigma, None))
        assert denoiser.encode(x, sigma, labels).shape == (6, network.encoder_channels, 8, 8)
        widen(network, 3)
        torch.testing.assert_close(denoiser.branches(x, sigma, labels), together[:, None].expand(-1, 3, -1, -1, -1))
    with pytest.raises(ValueError, match="multiple of 4"):
        ResidualNet(8, 1, 1, width=6)

import pytest
import torch
from network_tools import inputs, tiny

from stillhouse.diffusion import preconditioning as P
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.networks import MLP, Discriminator


def test_it_starts_at_zero_with_as_many_weights_as_planned():
    network = MLP(1, 2, 3, num_classes=4)
    assert network(torch.randn(5, 2, 1, 1), torch.randn(5), torch.arange(5) % 4).shape == (5, 3, 1, 1)
    assert not network(torch.randn(5, 2, 1, 1), torch.randn(5)).any()
    assert 150_000 < sum(p.numel() for p in MLP(1, 2, 2).parameters()) < 300_000


@pytest.mark.parametrize(
    "preconditioning", [P.EDM(), pytest.param(P.Velocity(), marks=pytest.mark.slow)], ids=lambda p: type(p).__name__
)
def test_every_preconditionings_noise_input_tells_levels_apart(preconditioning):
    """Learns to say which level it sees, from the noise input alone."""
    torch.manual_seed(0)
    net = MLP(1, 2, 2, width=64, num_blocks=2)
    sigma = torch.logspace(-2, 1.5, 64, dtype=torch.float64)
    target = sigma.log()[:, None].float()
    c_noise = preconditioning(sigma).noise.float()
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(300):
        loss = (net(torch.zeros(64, 2, 1, 1), c_noise).flatten(1) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.02 * target.var()
    assert Denoiser(net, preconditioning)(torch.randn(64, 2, 1, 1), sigma.float()).isfinite().all()


def test_a_discriminator_reads_the_features_that_the_output_is_made_of():
    network = tiny("mlp")
    features = network.encode(*inputs(network))
    assert features.shape == (6, network.encoder_channels, 1, 1)
    assert Discriminator(network)(features).shape == (6, 1)
    assert torch.equal(network.head(features), network(*inputs(network)))

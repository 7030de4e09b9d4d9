import torch

from stillhouse.networks.log_variance import LogVariance


def test_it_starts_at_zero_and_learns_the_logarithm_of_the_loss():
    """exp(-u) loss + u is least at u = ln(loss), here one that changes by a factor of 1000 with the noise level."""
    torch.manual_seed(0)
    module, sigma = LogVariance(), torch.logspace(-2.5, 1.5, 64)
    assert not module(sigma).any()
    loss = sigma.sqrt() / (1 + sigma) ** 2
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        u = module(sigma)
        ((-u).exp() * loss + u).mean().backward()
        optimizer.step()
    torch.testing.assert_close(module(sigma).detach(), loss.log(), rtol=0, atol=0.3)
    assert module(sigma.double()).dtype == torch.float32

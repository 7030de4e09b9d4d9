"""The regression losses against their formulas, computed by numpy in double precision, and f-divergences by quadrature."""

import numpy as np
import pytest
import torch

from stillhouse.diffusion.losses import (
    DIVERGENCES,
    REGRESSIONS,
    divergence_weights,
    pseudo_huber,
    regression,
    score_gradient,
)

SHAPE = (3, 8, 8)
D = 192
C = 0.00054 * D


def pair(scale=1.0, *leading):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(*leading, *SHAPE, generator=generator)
    return target + scale * torch.randn(target.shape, generator=generator), target


def by_numpy(output, target, kind):
    error = (output.double() - target.double()).flatten(-3).numpy()
    norm = np.linalg.norm(error, axis=-1)
    return {"l1": np.abs(error).sum(-1), "l2": norm**2 / 2, "huber": np.sqrt(norm**2 + C**2) - C}[kind]


@pytest.mark.parametrize("kind", REGRESSIONS)
@pytest.mark.parametrize("leading", [(5,), (5, 2)])
@pytest.mark.parametrize("scale", [0.003, 0.1, 3.0])
def test_values_are_the_formulas(kind, leading, scale):
    output, target = pair(scale, *leading)
    loss = regression(output, target, kind)
    assert loss.shape == leading
    np.testing.assert_allclose(loss.numpy(), by_numpy(output, target, kind), rtol=2e-5)
    halves = regression(output.bfloat16(), target.bfloat16(), kind)
    assert halves.dtype == torch.float32


def test_huber_is_quadratic_near_and_linear_far():
    # Around zero, so that the difference itself is not rounded.
    error, zero = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.zeros(4, *SHAPE)
    norm = error.flatten(1).norm(dim=1)
    near, far = 1e-5, 1e4
    torch.testing.assert_close(regression(near * error, zero, "huber"), (near * norm) ** 2 / (2 * C), rtol=1e-4, atol=0)
    torch.testing.assert_close(regression(far * error, zero, "huber"), far * norm - C, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_no_difference_is_no_loss_and_no_gradient(kind):
    target = torch.randn(2, *SHAPE)
    output = target.clone().requires_grad_()
    loss = regression(output, target, kind)
    loss.sum().backward()
    assert not loss.any()
    assert torch.equal(output.grad, torch.zeros_like(target))


def test_hubers_gradient_is_the_difference_over_its_root():
    output, target = pair(0.1, 4)
    output.requires_grad_()
    regression(output, target, "huber").sum().backward()
    error = (output - target).detach().double()
    root = (error.square().flatten(1).sum(1) + C**2).sqrt()
    torch.testing.assert_close(output.grad.double(), error / root.view(-1, 1, 1, 1), rtol=1e-4, atol=1e-6)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="^unknown regression loss 'lpips'; choose one of l1, l2, huber$"):
        regression(*pair(1.0, 1), "lpips")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [0.0, 1e-8, 0.06])
def test_pseudo_huber_of_any_width(dtype, c):
    """At no difference neither it nor its gradient is NaN, also for c = 0, where it is the norm."""
    error = torch.tensor([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]], dtype=dtype, requires_grad=True)
    distance = pseudo_huber(error.square().sum(1), c)
    distance.sum().backward()
    norm = error.detach().double().norm(dim=1)
    root = (norm**2 + c**2).sqrt()
    torch.testing.assert_close(distance.double(), norm**2 / (root + c).clamp_min(1e-30), rtol=1e-5, atol=0)
    expected = error.detach().double() / root.clamp_min(1e-30)[:, None]
    torch.testing.assert_close(error.grad.double(), expected, rtol=1e-5, atol=0)


# -- f-divergences ----------------------------------------------------------------------------------------------------

# f of E_q f(p / q), from the definitions.
F = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "hellinger": lambda r: (1 - r.sqrt()).square(),
    "softened_reverse_kl": lambda r: (1 + r) * ((1 + r) / r).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weighted_score_difference_is_the_gradient_of_the_f_divergence(name):
    """Of N(0.1, 0.8^2) and a generator's N(mu, 0.85^2) at noise level 0.6: by autograd through a quadrature, and by samples.

    The weights' mean over samples is one, so they give the gradient's direction; its size is E h(r), up to f's constant factor.
    """
    (p_mean, p_std), q_std, sigma = (0.1, 0.8), 0.85, torch.tensor(0.6, dtype=torch.float64)
    mu = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p = torch.distributions.Normal(p_mean, (p_std**2 + sigma**2).sqrt())
    q = torch.distributions.Normal(mu, (q_std**2 + sigma**2).sqrt())
    inside = x.abs() < 6  # beyond it both are nothing
    r = (p.log_prob(x) - q.log_prob(x))[inside].exp()
    (F[name](r) * q.log_prob(x)[inside].exp()).sum().mul(x[1] - x[0]).backward()

    count = 400_000
    y = 0.25 + q_std * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean()
    x = y + sigma * noise
    logits = (p.log_prob(x) - q.log_prob(x)).detach()
    assert logits.exp().min() > 0.1
    assert logits.exp().max() < 20
    weights, means = divergence_weights(
        logits, torch.zeros(count, dtype=torch.int64), torch.ones(3).double(), name, 0.0
    )
    torch.testing.assert_close(means, torch.ones(3).double(), rtol=0, atol=2e-3)  # E_q p / q = 1
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    images, s2 = y.view(-1, 1, 1, 1), sigma**2
    fake = (q_std**2 * x + s2 * 0.25) / (q_std**2 + s2)
    target = (p_std**2 * x + s2 * p_mean) / (p_std**2 + s2)
    gradient = score_gradient(images, fake.view_as(images), target.view_as(images), "edm").flatten() / s2
    factor = {"hellinger": 0.5}.get(name, 1)
    size = factor * DIVERGENCES[name](logits.exp()).mean()
    assert (size * (weights * gradient).mean()).item() == pytest.approx(mu.grad.item(), rel=0.01)
    if name == "reverse_kl":
        assert torch.equal(weights, torch.ones(count))

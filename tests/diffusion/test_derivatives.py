"""Derivatives along a path: both kinds against the closed form and against each other."""

import pytest
import torch
from network_tools import inputs, tiny

from closed_forms import FAMILIES, ExactNetwork, Mixture
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.derivatives import DERIVATIVES, derivative
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import SharedMasks
from stillhouse.networks.compiling import compile_network

KINDS = ("ddpmpp", "ncsnpp", "adm", "ddpm", "mlp")


def along(denoiser, kind, x, sigma, labels=None, **options):
    """dD/d ln(sigma) where x changes by its own size per unit."""
    return derivative(
        lambda x, sigma: denoiser(x, sigma, labels),
        (x.double(), sigma.double()),
        (x.double(), sigma.double()),
        kind,
        network=denoiser.network,
        masks=SharedMasks(),
        **options,
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", ["edm", "v", "velocity"])
def test_both_kinds_are_the_mixtures_derivative(family):
    """D(x, sigma) in float64, whose derivative autograd knows."""
    denoiser = Denoiser(ExactNetwork(family, Mixture()), FAMILIES[family]())
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-1.5, 1, 64, dtype=torch.float64)
    noise = torch.randn(64, 2, 1, 1, generator=generator, dtype=torch.float64)
    x = Mixture().sample(64, generator) + sigma.view(-1, 1, 1, 1) * noise
    expected = torch.func.jvp(lambda x, sigma: Mixture()(x, sigma), (x, sigma), (x, sigma))[1]
    for kind in DERIVATIVES:
        assert relative(along(denoiser, kind, x, sigma), expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_agree_on_every_network_with_equal_dropout_masks(kind):
    """Attention included, channels-last too, and under autocast, which neither follows; without gradients of weights."""
    network = tiny(kind, dropout=0.3).train().to(memory_format=torch.channels_last)
    x, c, *labels = inputs(network)
    x = x.to(memory_format=torch.channels_last)
    denoiser = Denoiser(network, FAMILIES["epsilon"]() if kind == "ddpm" else EDM())
    sigma = (c / 300).exp() if kind == "ddpm" else (c / 2).exp()

    def seeded(seed, kind):
        torch.manual_seed(seed)
        return along(denoiser, kind, x, sigma, *labels, step=2e-4 if fast else 1e-3)

    # Waves of 100 radians or more per unit of ln(sigma): half of this step is at the limit by float32, twice it by the waves.
    fast = kind in ("ddpm", "ncsnpp")
    exact = seeded(1, "forward")
    with torch.autocast("cpu", torch.bfloat16):
        network(*inputs(network))  # autocast keeps rounded weights from here on
        forward, finite = seeded(1, "forward"), seeded(1, "finite")
    torch.testing.assert_close(forward, exact)
    assert relative(finite, exact) < 1e-3
    assert not exact.requires_grad
    assert relative(seeded(2, "forward"), exact) > 0.01


@pytest.mark.slow
def test_a_compiled_network_has_both():
    network = tiny("ddpmpp")
    x, c, labels = inputs(network)
    denoiser, sigma = Denoiser(network, EDM()), (c / 2).exp()
    expected = along(denoiser, "forward", x, sigma, labels)
    compile_network(network, "eager")
    for kind in DERIVATIVES:
        assert relative(along(denoiser, kind, x, sigma, labels), expected) < 1e-3


def test_it_computes_without_tf32():
    seen, backends = [], (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    x = torch.ones(1, dtype=torch.float64)

    def function(x):
        seen.append([backend.allow_tf32 for backend in backends])
        return x**2

    try:
        for backend in backends:
            backend.allow_tf32 = True
        found = derivative(function, [x], [x], "finite", network=torch.nn.Identity(), masks=SharedMasks())
        assert [backend.allow_tf32 for backend in backends] == [True, True]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
    torch.testing.assert_close(found, 2 * x)
    assert seen == [[False, False]] * 2

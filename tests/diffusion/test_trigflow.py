"""TrigFlow against its definition: the network's output, and the velocity of the exact flow."""

import pytest
import torch
from network_tools import inputs, tiny

from closed_forms import FAMILIES, ExactNetwork, Mixture, column
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.trigflow import angle_of, trigflow_output

T = torch.tensor([0.003, 0.1, 0.6, 1.1, 1.5, 1.5645], dtype=torch.float64)


def test_with_edms_preconditioning_it_is_minus_the_networks_output():
    network = tiny("ddpmpp")
    x, _, labels = inputs(network)
    expected = -network(x / 0.5, (0.5 * T.tan()).log().float() / 4, labels)
    found = trigflow_output(Denoiser(network, EDM(0.5)), x.double(), T, 0.5, labels)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["edm", "vp", "velocity", "v"])
@pytest.mark.parametrize("s", [0.5, 0.3])
def test_every_denoiser_has_its_estimate_and_its_velocity(family, s):
    """D = cos(t) x_t - sin(t) s F, to the last digits at small t, and s F = E[cos(t) z - sin(t) x0 | x_t]."""
    generator = torch.Generator().manual_seed(0)
    images, z = Mixture().sample(6, generator), s * torch.randn(6, 2, 1, 1, generator=generator, dtype=torch.float64)
    cos, sin, sigma = column(T.cos()), column(T.sin()), s * T.tan()
    x_t = cos * images + sin * z
    found = trigflow_output(Denoiser(ExactNetwork(family, Mixture()), FAMILIES[family]()), x_t, T, s, None)
    estimate = Mixture()(x_t / cos, sigma)
    torch.testing.assert_close(cos * x_t - sin * s * found, estimate, rtol=1e-4, atol=2e-4)
    mean_z = (x_t - cos * estimate) / sin
    torch.testing.assert_close((s * found)[1:], (cos * mean_z - sin * estimate)[1:], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(angle_of(sigma, s), T)

"""All estimates of a denoiser whose network has branches."""

import pytest
import torch

from closed_forms import FAMILIES, BranchingCorrected, ExactNetwork, Mixture
from stillhouse.diffusion import preconditioning as P
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.schedules import ddpm_sigmas
from stillhouse.networks import DhariwalUNet, SongUNet, collapse, widen

TINY = {"resolution": 8, "in_channels": 2, "out_channels": 2, "model_channels": 16, "channel_mult": (1, 2)}
TINY |= {"num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}
NETWORKS = {
    "ddpmpp": lambda: SongUNet(**TINY),
    "skip": lambda: SongUNet(**TINY, decoder="skip", resample_filter=(1, 3, 3, 1)),
    "adm": lambda: DhariwalUNet(**TINY, channels_per_head=8),
}
SIGMA = ddpm_sigmas()[torch.tensor([5, 300, 800])]


def unet(kind, family):
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(network, FAMILIES[family]()).eval()


def noisy(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return SIGMA[:, None, None, None].to(dtype) * torch.randn(3, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_all_branches_start_as_the_teachers_estimate(kind, family):
    teacher, student = unet(kind, family), unet(kind, family)
    widen(student.network, 3)
    x = noisy(2, 8, 8)
    expected, estimates = teacher(x, SIGMA), student.branches(x, SIGMA)
    assert estimates.dtype == torch.float64
    assert estimates.shape == (3, 3, 2, 8, 8)
    torch.testing.assert_close(estimates, expected[:, None].expand_as(estimates), rtol=1e-5, atol=1e-5)
    assert torch.equal(student(x, SIGMA), expected)
    assert torch.equal(student.branches(x, SIGMA[1])[1], student.branches(x, SIGMA[1].expand(3))[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_one_branch_is_the_estimate_bit_for_bit(family, dtype):
    denoiser, x = unet("ddpmpp", family), noisy(2, 8, 8, dtype=dtype)
    estimates, expected = denoiser.branches(x, SIGMA), denoiser(x, SIGMA)
    assert estimates.dtype == expected.dtype == dtype
    assert torch.equal(estimates, expected[:, None])


@torch.no_grad()
def test_each_estimate_has_its_own_group():
    denoiser = unet("ddpmpp", "edm")
    widen(denoiser.network, 3)
    x = noisy(2, 8, 8)
    estimates = denoiser.branches(x, SIGMA)
    denoiser.network.heads["8"].conv.bias.view(3, 2)[1] += torch.tensor([1.0, -2.0])  # F of branch 1, by channel
    change = denoiser.branches(x, SIGMA) - estimates
    c_out = P.EDM()(SIGMA).out
    torch.testing.assert_close(change[:, 1, :, 4, 4], c_out[:, None] * torch.tensor([1.0, -2.0]), rtol=1e-4, atol=1e-4)
    assert not change[:, [0, 2]].any()


def test_under_autocast_the_combination_keeps_the_precision_of_x():
    denoiser, x = unet("ddpmpp", "edm"), noisy(2, 8, 8)
    widen(denoiser.network, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser.branches(x, SIGMA).dtype == torch.float64
        assert denoiser.branches(x.float(), SIGMA).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_branches_of_a_closed_form(family):
    """The test network of the methods: exact in every branch until its corrections are trained."""
    exact = Denoiser(ExactNetwork(family, Mixture()), FAMILIES[family]())
    denoiser = Denoiser(BranchingCorrected(exact.network), FAMILIES[family]())
    x = noisy(2, 1, 1)
    expected = exact(x, SIGMA)
    assert torch.equal(denoiser(x, SIGMA), expected)
    widen(denoiser.network, 4)
    assert torch.equal(denoiser.branches(x, SIGMA), expected[:, None].expand(3, 4, 2, 1, 1))
    denoiser.network.last.bias.add_(torch.arange(8.0))
    end_point = denoiser(x, SIGMA)
    torch.testing.assert_close(denoiser.branches(x, SIGMA)[:, -1], end_point)
    assert not torch.isclose(denoiser.branches(x, SIGMA)[:, 0], end_point).any()
    collapse(denoiser.network)
    assert torch.equal(denoiser(x, SIGMA), end_point)

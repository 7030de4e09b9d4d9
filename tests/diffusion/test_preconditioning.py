import json

import pytest
import torch

from closed_forms import FAMILIES, ExactNetwork, Mixture
from stillhouse.diffusion import preconditioning as P
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.losses import denoising_score_matching
from stillhouse.diffusion.schedules import ddpm_sigmas


def noisy(sigma, count=16):
    generator = torch.Generator().manual_seed(3)
    x0 = Mixture().sample(count, generator)
    return x0 + sigma[:, None, None, None] * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_denoiser(family):
    # Levels of the DDPM table, so that eps networks too are asked at their own times.
    sigma = ddpm_sigmas()[torch.linspace(5, 995, 16).long()]
    x = noisy(sigma)
    mixture = Mixture()
    denoiser = Denoiser(ExactNetwork(family, mixture), FAMILIES[family]())
    expected = mixture(x, sigma)
    # The network's float32 output is multiplied by c_out; allow for its rounding.
    tolerance = 2e-6 * (1 + denoiser.preconditioning(sigma).out.abs().max().item())
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(denoiser(x, sigma[3])[3], denoiser(x, sigma)[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_weight_makes_the_loss_the_networks_own_mse(family):
    """lambda |D - x0|^2 with an exact network must equal |F - target|^2 in that family's own variables."""
    sigma = ddpm_sigmas()[torch.tensor([100, 300, 600, 800])]
    generator = torch.Generator().manual_seed(0)
    x0 = Mixture().sample(4, generator)
    e = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    preconditioning = FAMILIES[family]()
    network = ExactNetwork(family, Mixture())
    loss = denoising_score_matching(Denoiser(network, preconditioning), x0, sigma, e)

    c = preconditioning(sigma[:, None, None, None])
    x = x0 + sigma[:, None, None, None] * e
    output = network((c.in_ * x).float(), c.noise.flatten().float()).double()
    s = sigma[:, None, None, None]
    a_vp = 1 / (1 + s**2).sqrt()
    target = {
        "epsilon": e,
        "vp": e,
        "ve": -e,
        "v": a_vp * e - s * a_vp * x0,
        "x0": x0,
        "velocity": x0 - e,
        "edm": (x0 - 0.25 / (s**2 + 0.25) * x) * (s**2 + 0.25).sqrt() / (0.5 * s),
    }[family]
    torch.testing.assert_close(loss, (output - target).square().flatten(1).sum(1), rtol=1e-4, atol=1e-6)


def test_epsilon_index_is_exact_on_the_table_and_interpolates_between():
    epsilon = P.Epsilon()
    table = ddpm_sigmas()
    assert torch.equal(epsilon.index(table), torch.arange(1000.0, dtype=torch.float64))
    assert torch.equal(epsilon.index(table.float()), torch.arange(1000.0, dtype=torch.float64))
    between = epsilon.index((table[:-1] * table[1:]).sqrt())
    torch.testing.assert_close(between, torch.arange(999.0, dtype=torch.float64) + 0.5)
    assert epsilon.index(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]


def test_vp_and_ve_are_edms_table_1():
    """Noise levels and time inputs of NVlabs/edm's own VPPrecond (commit 008a4e5) at t = 1e-5, 1e-3, 0.5 and 1."""
    sigma = torch.tensor([0.0010004976266502028, 0.010485992786706403, 3.41291830906912, 152.1669702839464]).double()
    c = P.VP()(sigma)
    assert c.noise.tolist() == pytest.approx([0.00999, 0.999, 499.5, 999.0], rel=1e-7)
    torch.testing.assert_close(P.VP()(sigma.float()).noise.double(), c.noise, rtol=1e-6, atol=0)
    assert (c.skip == 1).all()
    torch.testing.assert_close(c.in_, (1 + sigma**2).rsqrt())
    assert torch.equal(c.out, -sigma)
    torch.testing.assert_close(P.VP().loss_weight(sigma), 1 / sigma**2)
    assert P.VP(timesteps=101)(sigma[-1:]).noise.item() == pytest.approx(100)

    c = P.VE()(sigma)
    assert torch.equal(c.noise, (sigma / 2).log())
    assert (c.skip == 1).all()
    assert (c.in_ == 1).all()
    assert torch.equal(c.out, sigma)
    torch.testing.assert_close(P.VE().loss_weight(sigma), 1 / sigma**2)


def test_vp_agrees_with_epsilon_on_ddpms_own_levels():
    """beta(t) / 1000 is DDPM's, so that index i is time (i + 1) / 1000 to within the difference of sums and integrals."""
    sigma = ddpm_sigmas()[torch.tensor([10, 100, 500, 999])]
    assert P.VP()(sigma).noise.tolist() == pytest.approx([10.0, 100.0, 500.0, 999.0], abs=4)
    assert isinstance(P.VP(timesteps=500).one_step(), P.ResidualEpsilon)
    assert P.VP(timesteps=500).one_step().timesteps == 500


def test_one_step_form_of_an_eps_network_is_the_residual():
    network = ExactNetwork("epsilon", Mixture())
    student = Denoiser(network, P.Epsilon().one_step())
    z = torch.randn(8, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    sigma = ddpm_sigmas()[-1].float()
    x = z * student.preconditioning.prior_std(sigma)
    expected = z - network(z, torch.full((8,), 999.0))
    torch.testing.assert_close(student(x, sigma), expected, rtol=0, atol=1e-5)
    assert isinstance(P.V().one_step(), P.V)


@pytest.mark.parametrize(
    ("family", "std"), [("edm", 80.0), ("epsilon", (80**2 + 1) ** 0.5), ("vp", 80.0), ("ve", 80.0), ("velocity", 81.0)]
)
def test_sampling_starts_with_unit_noise_in_the_networks_variable(family, std):
    assert FAMILIES[family]().prior_std(torch.tensor(80.0)).item() == pytest.approx(std)


def test_denoiser_keeps_float64_and_ignores_autocast():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, z, noise_labels, class_labels=None):
            seen.append((z.dtype, noise_labels.dtype))
            return (z.flatten(1) @ torch.eye(2)).reshape(z.shape)

    denoiser = Denoiser(Spy(), P.EDM())
    x = torch.randn(4, 2, 1, 1)
    assert denoiser(x.double(), torch.tensor(2.0)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = denoiser(x, torch.tensor(2.0))
    assert out.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * 2
    # Only the network's own matmul may be rounded to bf16, not the skip connection.
    c = P.EDM()(torch.tensor(2.0))
    assert (out - denoiser(x, torch.tensor(2.0))).abs().max() < 0.01 * c.out


def test_edms_network_as_a_consistency_function_is_the_published_one():
    """c_skip and c_out of arXiv 2303.01469, appendix C; c_in and c_noise stay."""
    sigma, sigma_min = torch.tensor([0.002, 0.01, 0.5, 80.0], dtype=torch.float64), 0.002
    c, edm = P.Consistency(P.EDM(0.5), sigma_min)(sigma), P.EDM(0.5)(sigma)
    torch.testing.assert_close(c.skip, 0.25 / ((sigma - sigma_min) ** 2 + 0.25))
    torch.testing.assert_close(c.out, 0.5 * (sigma - sigma_min) / (sigma**2 + 0.25).sqrt())
    assert torch.equal(c.in_, edm.in_)
    assert torch.equal(c.noise, edm.noise)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "x0"])
def test_a_consistency_function_leaves_clean_images_as_they_are_and_is_the_denoiser_of_pure_noise(family):
    network = ExactNetwork(family, Mixture())
    denoiser = Denoiser(network, FAMILIES[family]())
    consistency = Denoiser(network, P.Consistency(denoiser.preconditioning, 0.02))
    x = noisy(torch.full((16,), 0.02, dtype=torch.float64))
    assert torch.equal(consistency(x, torch.tensor(0.02)), x)
    x, high = noisy(torch.full((16,), 50.0, dtype=torch.float64)), torch.tensor(50.0)
    torch.testing.assert_close(consistency(x, high), denoiser(x, high), rtol=2e-3, atol=0.05)
    assert consistency.preconditioning.prior_std(high) == denoiser.preconditioning.prior_std(high)


def test_a_description_as_json_makes_the_same_preconditioning():
    sigma = torch.tensor([0.01, 1.0, 50.0])
    ours = [P.EDM(0.7), P.VP(15.0, 0.2, 500), P.VE(), P.Epsilon(500, 2e-4, 0.03), P.ResidualEpsilon(7), P.V(), P.X0()]
    ours += [P.Velocity(), P.Consistency(P.EDM(0.7), 0.01), P.EDM1000(0.7)]
    assert {type(one) for one in ours} == set(P.PRECONDITIONINGS.values())
    for one in ours:
        again = P.from_description(json.loads(json.dumps(P.description_of(one))))
        assert all(torch.equal(a, b) for a, b in zip(one(sigma), again(sigma), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.EDM(sigma_data=0), "sigma_data must be positive, got 0"),
        (lambda: P.Consistency(P.EDM(), 0.0), "sigma_min must be positive, got 0.0"),
        (lambda: P.Consistency(P.X0()), r"X0 can't be read as a consistency function: at small noise D\(x\) is not x"),
        *((lambda o=o: P.VP(**o), "need beta_d > 0, beta_min > 0 and") for o in ({"beta_d": 0}, {"timesteps": 1})),
    ],
)
def test_impossible_ones_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from closed_forms import MEANS, ExactMeanVelocity, ExactNetwork, Mixture, exact_solution, exact_teacher
from stillhouse.diffusion import preconditioning as P
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.interpolation import slerp
from stillhouse.diffusion.schedules import ddim_quadratic, ddim_uniform, flow_uniform, karras
from stillhouse.diffusion.solvers import (
    SOLVERS,
    analytic_step,
    check_solver,
    euler,
    euler_step,
    evaluations,
    heun,
    jumps,
    stochastic_heun,
)

SIGMA_MAX = 10.0


def latents(count=8):
    generator = torch.Generator().manual_seed(0)
    return SIGMA_MAX * torch.randn(count, 1, 1, 2, generator=generator, dtype=torch.float64)


def last(states):
    *_, state = states
    return state


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_convergence_order_to_the_exact_ode(solver, order):
    x = latents()
    truth = exact_solution(x, SIGMA_MAX, 0.05)
    errors = []
    for steps in (40, 80, 160):
        sigmas = karras(steps + 1, sigma_min=0.05, sigma_max=SIGMA_MAX)[:-1]  # without the last step to zero
        errors.append((last(solver(Mixture(), x, sigmas)) - truth).abs().mean().item())
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert rates == pytest.approx(order, abs=0.2)


def test_states_come_after_every_step_and_evaluations_are_counted():
    calls = []

    def denoiser(x, sigma, labels):
        calls.append(float(sigma))
        return Mixture()(x, sigma)

    sigmas = karras(6)
    for solver, options in (("euler", {}), ("heun", {}), ("stochastic_heun", {"s_churn": 0}), ("dpm_solver_pp", {})):
        calls.clear()
        states = list(SOLVERS[solver].solve(denoiser, latents(), sigmas, **options))
        assert len(states) == 6
        assert len(calls) == evaluations(solver, 6)
    # The last step to zero returns the denoiser itself.
    torch.testing.assert_close(states[-1], Mixture()(states[-2], sigmas[-2]))


def test_jumps_by_the_exact_mean_velocity_end_on_the_path_whatever_the_levels():
    gaussian = Mixture(MEANS[:1])
    denoiser = Denoiser(ExactMeanVelocity(gaussian), P.Velocity())
    mean, x = gaussian.means[0].view(2, 1, 1), 8 * latents().view(8, 2, 1, 1)
    for sigmas in ([80.0, 0.0], [80.0, 2.0, 0.0], [80.0, 30.0, 1.0, 0.3, 0.0]):
        states = list(jumps(denoiser, x, torch.tensor(sigmas, dtype=torch.float64)))
        assert len(states) == evaluations("jumps", len(sigmas) - 1)
        for state, sigma in zip(states, sigmas[1:], strict=True):
            exact = mean + (x - mean) * ((gaussian.std**2 + sigma**2) / (gaussian.std**2 + 80**2)) ** 0.5
            torch.testing.assert_close(state, exact, rtol=1e-5, atol=1e-4)


def test_no_teacher_jumps():
    with pytest.raises(
        ValueError, match="teacher.solver='jumps' is unknown; choose one of euler, .*, renoising, ancestral$"
    ):
        check_solver("teacher", "jumps", {})


def test_euler_keeps_the_bits_of_its_formula():
    x, levels = latents().float(), karras(6).tolist()
    for state, (sigma, following) in zip(euler(Mixture(), x, karras(6)), pairwise(levels), strict=True):
        x = x + (following - sigma) * ((x - Mixture()(x, torch.tensor(sigma))) / sigma)
        assert torch.equal(state, x)
        assert state.dtype == torch.float32


def test_euler_step_takes_a_level_per_sample_and_per_branch():
    x, estimate = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, following = torch.rand(2, 4, dtype=torch.float64) + torch.tensor([[1.0], [0.0]])
    whole = euler_step(x, estimate, sigma[:, None, None, None], following[:, None, None, None])
    for i in range(4):
        assert torch.equal(whole[i], euler_step(x[i], estimate[i], sigma[i].item(), following[i].item()))
    branches = torch.stack([estimate, 2 * estimate], 1)
    ends = torch.tensor([0.5, 0.0], dtype=torch.float64)
    both = euler_step(x[:, None], branches, 2.0, ends[:, None, None, None])
    for k in range(2):
        assert torch.equal(both[:, k], euler_step(x, branches[:, k], 2.0, ends[k].item()))
    torch.testing.assert_close(both[:, 1], branches[:, 1])  # a step to zero ends at the estimate


def test_the_analytic_first_step_is_nearly_the_step_it_saves():
    unit = torch.randn(64, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 80 * unit
    for following in (10.93, 19.0, 31.7):  # SFD's second levels of 4, 5 and 7
        saved = analytic_step(x, 80.0, following)
        torch.testing.assert_close(saved, x * (1 + (following - 80) / math.sqrt(1 + 80**2)))
        exact = euler_step(x, Mixture()(x, torch.tensor(80.0)), 80.0, following)
        # What it leaves out is the pull towards the data, less than (1 - sigma'/sigma) max|mean|.
        assert (saved - exact).abs().max() < (1 - following / 80) * 0.7 + 0.01
        assert (saved - exact).norm() / x.norm() < 0.01
        # The ODE of unit Gaussian data has the solution x sqrt(1 + sigma'^2) / sqrt(1 + sigma^2).
        solution = x * math.sqrt((1 + following**2) / (1 + 80**2))
        torch.testing.assert_close(saved, solution, rtol=5e-3, atol=0)
    levels = torch.full((64, 1, 1, 1), 80.0, dtype=torch.float64)
    torch.testing.assert_close(analytic_step(x, levels, levels / 2), analytic_step(x, 80.0, 40.0))


@pytest.mark.parametrize("schedule", [ddim_uniform, ddim_quadratic])
def test_euler_is_diffusers_ddim(schedule):
    denoiser = Denoiser(network := ExactNetwork("epsilon", Mixture()), P.Epsilon())
    sigmas = schedule(20)
    z = torch.randn(16, 1, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = list(euler(denoiser, z * denoiser.preconditioning.prior_std(sigmas[0]), sigmas))

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    indices = denoiser.preconditioning.index(sigmas[:-1]).long().tolist()
    for step, index in enumerate(indices):
        following = indices[step + 1] if step + 1 < len(indices) else -1  # -1: the data, abar = 1
        scale = scheduler.alphas_cumprod[following].sqrt().item() if following >= 0 else 1.0
        scheduler.num_inference_steps = Stride(index - following)
        epsilon = network(z, torch.full((16,), float(index)))
        z = scheduler.step(epsilon.double(), index, z).prev_sample
        torch.testing.assert_close(ours[step] * scale, z, rtol=0, atol=1e-5)


class Stride:
    """DDIMScheduler.step goes `num_train_timesteps // num_inference_steps` indices back: make that any stride."""

    def __init__(self, stride: int):
        self.stride = stride

    def __rfloordiv__(self, _: int) -> int:
        return self.stride


def test_euler_in_flow_time_is_the_straight_velocity_step():
    network = ExactNetwork("velocity", Mixture())
    denoiser = Denoiser(network, P.Velocity())
    sigmas = flow_uniform(10)
    z = torch.randn(8, 1, 1, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = last(euler(denoiser, z * denoiser.preconditioning.prior_std(sigmas[0]), sigmas))
    times = 1 / (1 + sigmas)
    for t, following in pairwise(times):
        z = z + (following - t) * network(z, (999 * t).expand(8).float()).double()
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-5)


def test_churn_of_zero_is_heun_and_churned_samples_follow_the_distribution():
    x = latents()
    assert torch.equal(last(stochastic_heun(Mixture(), x, karras(8), s_churn=0)), last(heun(Mixture(), x, karras(8))))
    # One Gaussian: the SDE must keep the marginal N(mean, std^2).
    gaussian = Mixture(means=torch.tensor([[0.3, -0.2]], dtype=torch.float64), std=0.5)
    start = 80 * torch.randn(20000, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = last(stochastic_heun(gaussian, start, karras(64), s_churn=30)).flatten(1)
    assert (end.mean(0) - gaussian.means[0]).abs().max() < 0.02
    assert (end.std(0) - 0.5).abs().max() < 0.02
    deterministic = last(heun(gaussian, start, karras(64))).flatten(1)
    assert np.corrcoef(end[:, 0], deterministic[:, 0])[0, 1] < 0.9  # noise was really added


def test_churn_does_not_depend_on_the_batch():
    x = latents(6)
    sigmas = karras(8, sigma_max=SIGMA_MAX)
    whole = last(stochastic_heun(Mixture(), x, sigmas, s_churn=4))
    parts = [last(stochastic_heun(Mixture(), part, sigmas, s_churn=4)) for part in x.split(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_churn_settings_are_checked():
    with pytest.raises(ValueError, match="need s_churn >= 0"):
        stochastic_heun(Mixture(), latents(), karras(4), s_churn=-1)  # before any state is asked for
    with pytest.raises(ValueError, match="solver_options=.* do not fit the solver 'euler'"):
        exact_teacher(solver="euler", solver_options={"s_churn": 3})
    with pytest.raises(ValueError, match="do not fit the solver 'stochastic_heun': .*missing .*s_churn"):
        exact_teacher(solver="stochastic_heun")
    with pytest.raises(ValueError, match="do not fit the solver 'stochastic_heun': need s_churn >= 0"):
        exact_teacher(solver="stochastic_heun", solver_options={"s_churn": -1})


def test_teacher_samples_the_mixture_and_names_itself():
    teacher = exact_teacher(steps=16)
    noise = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    samples = teacher.sample(noise)
    nearest = torch.cdist(samples.flatten(1).double(), Mixture().means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / 4000
    assert (shares - 1 / 3).abs().max() < 0.04
    residual = samples.flatten(1).double() - Mixture().means[nearest]
    assert residual.std().item() == pytest.approx(0.2, abs=0.02)
    assert teacher.nfe() == 31
    assert len(list(teacher.trajectory(noise[:4], steps=5))) == 5

    same, other = exact_teacher(), exact_teacher()
    other.denoiser.network.last.bias.data += 1
    assert len(teacher.hash) == 64
    other.denoiser.network.load_state_dict(same.denoiser.network.state_dict())
    assert same.hash == other.hash
    with pytest.raises(ValueError, match="teacher.solver='eular' is unknown; choose one of euler, heun"):
        exact_teacher(solver="eular")


def test_teacher_is_frozen_and_its_student_is_not():
    import copy

    teacher = exact_teacher()
    assert copy.deepcopy(teacher) is teacher
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    student = teacher.student()
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        student.network.last.bias += 1
    assert (teacher.denoiser.network.last.bias == 0).all()


def test_slerp_follows_the_great_circle():
    generator = torch.Generator().manual_seed(0)
    z0, z1 = torch.randn(2, 5, 3, 8, 8, generator=generator)
    u = torch.linspace(0, 1, 11)
    path = slerp(z0, z1, u)
    assert path.shape == (11, 5, 3, 8, 8)
    torch.testing.assert_close(path[0], z0)
    torch.testing.assert_close(path[-1], z1)
    unit0, unit1 = (z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in (z0, z1))
    circle = slerp(unit0, unit1, u).flatten(2)
    torch.testing.assert_close(circle.norm(dim=2), torch.ones(11, 5), rtol=0, atol=1e-5)
    angles = (circle * circle[:1]).sum(2).clamp(-1, 1).arccos()
    torch.testing.assert_close(angles, u[:, None] * angles[-1:], rtol=0, atol=2e-3)
    torch.testing.assert_close(slerp(z0, z0, u), z0.expand(11, *z0.shape))

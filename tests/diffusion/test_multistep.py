from itertools import chain, islice, product

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from closed_forms import MEANS, Mixture, exact_solution, exact_teacher
from stillhouse.diffusion import multistep
from stillhouse.diffusion.multistep import dpm_solver_pp, dynamic_threshold
from stillhouse.diffusion.schedules import karras, karras_grid
from stillhouse.diffusion.solvers import euler

SIGMA_MAX = 10.0


def latents(count=8, scale=SIGMA_MAX):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(count, 1, 1, 2, generator=generator, dtype=torch.float64)


def errors(order, counts=(40, 80, 160)):
    """Mean error at sigma = 0.05 against the exact ODE, for each number of steps."""
    truth = exact_solution(latents(), SIGMA_MAX, 0.05)
    return np.array(
        [
            (list(dpm_solver_pp(Mixture(), latents(), grid, order=order, lower_order_final=False))[-1] - truth)
            .abs()
            .mean()
            .item()
            for grid in (karras_grid(n, sigma_min=0.05, sigma_max=SIGMA_MAX) for n in counts)
        ]
    )


def rates(of):
    return np.log2(of[:-1] / of[1:])


def against_diffusers(order, final, mixture=None, threshold=None, lower_order_final=True):
    """Run both on diffusers' own VP levels: our state / sqrt(1 + sigma^2) is its sample after every step."""
    mixture = mixture or Mixture()
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_type="midpoint",  # the paper's 2M; "heun" puts another weight of the same order on the line
        solver_order=order,
        prediction_type="sample",
        lower_order_final=lower_order_final,
        final_sigmas_type=final,
        thresholding=threshold is not None,
        dynamic_thresholding_ratio=threshold or 0.995,
        sample_max_value=1e6,  # its default of 1 would make thresholding a plain clip
    )
    scheduler.set_timesteps(10)  # from 15 steps on diffusers ignores lower_order_final
    sigmas = scheduler.sigmas.double()
    z = latents(16, scale=1)
    ours = list(
        dpm_solver_pp(
            mixture,
            z * (1 + sigmas[0] ** 2).sqrt(),
            sigmas,
            order=order,
            lower_order_final=lower_order_final,
            threshold=threshold,
        )
    )
    for step, timestep in enumerate(scheduler.timesteps):
        estimate = mixture(z * (1 + sigmas[step] ** 2).sqrt(), sigmas[step])
        z = scheduler.step(estimate, timestep, z).prev_sample
        torch.testing.assert_close(ours[step] / (1 + sigmas[step + 1] ** 2).sqrt(), z, rtol=0, atol=2e-5)
    return ours


@pytest.mark.parametrize(
    ("order", "final", "lower_order_final"), product((1, 2, 3), ("zero", "sigma_min"), (True, False))
)
def test_every_order_is_diffusers(order, final, lower_order_final):
    against_diffusers(order, final, lower_order_final=lower_order_final)


def test_thresholding_is_diffusers_and_changes_the_solution():
    wide = Mixture(means=4 * MEANS)  # estimates well out of [-1, 1]
    thresholded = against_diffusers(3, "zero", wide, threshold=0.6)[-1]
    assert (thresholded - against_diffusers(3, "zero", wide)[-1]).abs().max() > 0.5
    assert thresholded.abs().max() <= 1


@pytest.mark.parametrize("order", [1, 2])
def test_convergence_order_to_the_exact_ode(order):
    assert rates(errors(order)) == pytest.approx(order, abs=0.1)


def test_order_3_as_published_falls_with_the_square_and_is_the_integral_but_for_one_factor(monkeypatch):
    published = errors(3)
    assert rates(published) == pytest.approx(2, abs=0.15)
    assert (published < errors(2) / 3.5).all()
    monkeypatch.setattr(multistep, "QUADRATIC_SHARE", 1.0)
    assert rates(errors(3)) == pytest.approx(3, abs=0.3)
    # Where it is used, with few steps, the published factor is no worse.
    exact = errors(3, (8, 12))
    monkeypatch.undo()
    assert (errors(3, (8, 12)) < exact).all()


def test_order_1_is_euler_to_rounding():
    for sigmas in (karras(8, sigma_max=SIGMA_MAX), karras_grid(8, sigma_max=SIGMA_MAX)):
        ours = torch.stack(list(dpm_solver_pp(Mixture(), latents(), sigmas, order=1)))
        torch.testing.assert_close(ours, torch.stack(list(euler(Mixture(), latents(), sigmas))), rtol=0, atol=1e-13)


def test_the_step_to_zero_is_the_estimate():
    sigmas = karras(6, sigma_max=SIGMA_MAX)
    for lower_order_final in (True, False):
        states = list(dpm_solver_pp(Mixture(), latents(), sigmas, lower_order_final=lower_order_final))
        assert torch.equal(states[-1], Mixture()(states[-2], sigmas[-2]))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_state_on_the_way_is_the_end_of_a_shorter_solve(order):
    grid = karras_grid(8, sigma_max=SIGMA_MAX)
    states = list(dpm_solver_pp(Mixture(), latents(), grid, order=order, lower_order_final=False))
    for taken in range(1, 9):
        *_, end = dpm_solver_pp(Mixture(), latents(), grid[: taken + 1], order=order, lower_order_final=False)
        assert torch.equal(end, states[taken - 1])


def test_history_is_kept_for_who_takes_a_few_states_at_a_time():
    grid = karras_grid(12, sigma_max=SIGMA_MAX)  # SFD's: 3 intervals of 4 steps
    whole = list(dpm_solver_pp(Mixture(), latents(), grid))
    solver = dpm_solver_pp(Mixture(), latents(), grid)
    intervals = [list(islice(solver, 4)) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(whole, chain(*intervals), strict=True))
    # A solver started anew in the second interval has to begin with order 1: another trajectory.
    fresh = list(dpm_solver_pp(Mixture(), whole[3], grid[4:]))
    assert not torch.allclose(fresh[3], whole[7], rtol=0, atol=1e-4)


def test_states_keep_the_dtype_of_x():
    for dtype in (torch.float32, torch.float64):
        states = list(dpm_solver_pp(Mixture(), latents().to(dtype), karras(5), threshold=0.9))
        assert {state.dtype for state in states} == {dtype}


def test_dynamic_threshold_by_hand():
    estimate = torch.tensor([[0.0, 1.0, -2.0, 3.0, -4.0], [0.1, -0.9, 0.5, 0.2, -0.3]], dtype=torch.float64)
    # Sorted |D| of the first: 0 1 2 3 4, so that the 0.9 quantile is at place 3.6: s = 3.6. The second stays: s = 1.
    expected = torch.tensor([[0, 1 / 3.6, -2 / 3.6, 3 / 3.6, -1], [0.1, -0.9, 0.5, 0.2, -0.3]], dtype=torch.float64)
    torch.testing.assert_close(dynamic_threshold(estimate, 0.9), expected)
    images = estimate[:, :, None, None]
    assert torch.equal(dynamic_threshold(images, 0.9)[:, :, 0, 0], dynamic_threshold(estimate, 0.9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be 1, 2 or 3, got 4"),
        ({"order": 2.0}, "order must be 1, 2 or 3, got 2.0"),
        ({"threshold": 2}, "threshold must lie in .* or be null for no thresholding; got 2"),
        ({"threshold": 0}, "threshold must lie in"),
    ],
)
def test_options_are_refused_at_the_call_and_by_the_teacher(options, message):
    with pytest.raises(ValueError, match=message):
        dpm_solver_pp(Mixture(), latents(), karras(4), **options)
    with pytest.raises(ValueError, match=f"solver_options=.* do not fit the solver 'dpm_solver_pp': {message}"):
        exact_teacher(solver="dpm_solver_pp", solver_options=options)


def test_a_teacher_takes_it_with_one_evaluation_a_step():
    noise = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    teacher = exact_teacher(steps=12, solver="dpm_solver_pp", solver_options={"order": 3})
    assert teacher.nfe() == 12
    assert teacher.nfe(5) == len(list(teacher.trajectory(noise[:4], steps=5))) == 5
    assert teacher.solver_name == "dpm_solver_pp(order=3)"
    truth = exact_teacher(steps=200).sample(noise)
    error = {
        name: (exact_teacher(steps=12, solver=name).sample(noise) - truth).abs().mean()
        for name in ("dpm_solver_pp", "euler")
    }
    assert error["dpm_solver_pp"] < 0.8 * error["euler"]

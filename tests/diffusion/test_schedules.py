import math

import pytest
import torch
from diffusers import DDIMScheduler

from stillhouse.diffusion import schedules as S

ALL = {
    "karras": S.karras,
    "log_snr_uniform": S.log_snr_uniform,
    "cosine_uniform": S.cosine_uniform,
    "flow_uniform": S.flow_uniform,
    "ddim_uniform": S.ddim_uniform,
    "ddim_quadratic": S.ddim_quadratic,
}


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_schedules_descend_to_zero_in_double_precision(schedule, steps):
    sigmas = schedule(steps)
    assert sigmas.dtype == torch.float64
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert len(sigmas) == steps + 1 or schedule is S.ddim_quadratic


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_impossible_step_counts_are_refused(schedule, steps):
    with pytest.raises(ValueError, match=f"number of solver steps must be .*, got {steps}"):
        schedule(steps)


def test_karras_known_values():
    """EDM's 18-step grid: the levels of the grid without a zero, to the last bit, and the zero."""
    torch.testing.assert_close(S.karras(18)[[0, 17]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert torch.equal(S.karras(18)[:-1], S.karras_grid(17, sigma_min=0.002))
    assert S.karras(1).tolist() == pytest.approx([80.0, 0.0])


# SFD's levels, as its paper and code print them: num_steps counts levels.
SFD_LEVELS = {
    4: [80, 10.93, 0.670, 0.006],
    5: [80, 19.0, 3.11, 0.268, 0.006],
    6: [80, 25.96, 6.79, 1.289, 0.145, 0.006],
    7: [80, 31.7, 10.9, 3.11, 0.670, 0.0936, 0.006],
}


@pytest.mark.parametrize("count", SFD_LEVELS)
def test_karras_grid_is_sfds(count):
    grid = S.karras_grid(count - 1)
    torch.testing.assert_close(grid, torch.tensor(SFD_LEVELS[count], dtype=torch.float64), rtol=4e-3, atol=0)
    assert grid.dtype == torch.float64
    assert grid[-1].item() == pytest.approx(0.006, rel=1e-14)  # no zero after it


def test_a_finer_grid_holds_the_coarse_one_by_index():
    anew = []
    for intervals in range(1, 7):
        for substeps in range(1, 6):
            fine = S.karras_grid(intervals * substeps)
            coarse = fine[::substeps]
            torch.testing.assert_close(coarse, S.karras_grid(intervals), rtol=1e-13, atol=0)
            assert len(coarse) == intervals + 1
            assert coarse[-1] == fine[-1]
            anew.append(torch.equal(coarse, S.karras_grid(intervals)))
    assert not all(anew)  # why the docstring says: by index


def test_ddpm_table_is_diffusers():
    alphas = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod.double()
    torch.testing.assert_close(S.ddpm_sigmas(), ((1 - alphas) / alphas).sqrt(), rtol=1e-4, atol=0)


def test_ddim_uniform_takes_diffusers_indices():
    scheduler = DDIMScheduler(beta_schedule="linear", timestep_spacing="leading", steps_offset=0)
    for steps in (10, 50, 100):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(S.ddim_uniform(steps)[:-1], S.ddpm_sigmas()[scheduler.timesteps], rtol=0, atol=0)


def test_ddim_quadratic_is_denoising_students_schedule():
    """100 entries 0,0,0,0,1,2,2,3,5,...,800: 96 distinct indices, the top one 800."""
    sigmas = S.ddim_quadratic(100)[:-1].flip(0)
    table = S.ddpm_sigmas()
    indices = [(table - sigma).abs().argmin().item() for sigma in sigmas]
    assert len(indices) == 96
    assert indices[:5] == [0, 1, 2, 3, 5]
    assert indices[-1] == 800


def test_cosine_uniform_is_the_clipped_log_snr_schedule():
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    for i, sigma in enumerate(S.cosine_uniform(8)[:-1]):
        log_snr = -2 * math.log(math.tan(a * (8 - i) / 8 + b))
        assert sigma.item() == pytest.approx(math.exp(-log_snr / 2), rel=1e-6)


def test_uniformity_in_each_own_coordinate():
    flow = S.flow_uniform(20)
    torch.testing.assert_close((1 / (1 + flow)).diff(), torch.full((20,), 0.999 / 20, dtype=torch.float64))
    log = S.log_snr_uniform(20)[:-1].log().diff()
    torch.testing.assert_close(log, log[0].expand(19))


def test_bad_ranges_are_refused():
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        S.karras(4, sigma_min=5, sigma_max=2)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, got sigma_min=0, sigma_max=80"):
        S.karras_grid(4, sigma_min=0)
    with pytest.raises(ValueError, match="rho must be positive, got 0"):
        S.karras(4, rho=0)
    with pytest.raises(ValueError, match="number of intervals must be at least 1, got 0"):
        S.karras_grid(0)
    with pytest.raises(ValueError, match="t_start must lie in"):
        S.flow_uniform(4, t_start=0.0)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        S.ddim_uniform(2000)

"""SFD against the closed-form teacher: grids, states, the walk along a trajectory, several numbers of steps, two stages."""

from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from closed_forms import BranchingCorrected, Mixture, energy_distance, exact_teacher, fit
from lightning_modules import SFD
from stillhouse.checkpoints import load_weights, save_weights
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import karras, karras_grid
from stillhouse.diffusion.solvers import analytic_step, dpm_solver_pp, euler, euler_step, heun
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks import SongUNet


def method(teacher=None, kimg=0.384, lr=1e-3, batch_size=32, seed=0, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=BranchingCorrected)
    common = {"name": "sfd", "batch_size": batch_size, "seed": seed, "kimg": kimg, "lr": lr}
    return SFD(teacher, **common, **({"steps": 2} | options))


def unet(num_classes=0):
    torch.manual_seed(0)
    options = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
    network = SongUNet(8, 1, 1, num_classes=num_classes, dropout=0.3, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Teacher("random", network, EDM(), karras, steps=4)


class Walk(pl.Callback):
    """What happens in each training step, read off the module's own calls."""

    def __init__(self, module):
        self.steps, self.states = [], []
        training_step, next_states, branches = module.training_step, module.next_states, module.student.branches

        def step(batch, batch_idx):
            self.steps.append({"position": batch["position"], "global": module.trainer.global_step})
            loss = training_step(batch, batch_idx)
            count = module.student.network.embed.steps.count.item() if len(module.choices) > 1 else None
            self.steps[-1] |= {"loss": loss.item(), "target": self.states[-1], "next": module.x, "told": count}
            self.steps[-1]["drawn"] = module.steps_under_way
            return loss

        def states():
            self.states.append(next_states())
            return self.states[-1]

        def read(x, sigma, labels):
            estimates = branches(x, sigma, labels)
            self.steps[-1] |= {"x": x, "sigma": sigma, "labels": labels, "estimates": estimates.detach()}
            return estimates

        module.training_step, module.next_states, module.student.branches = step, states, read

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps[-1]["lr"] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, module, *_):
        self.steps[-1]["weights"] = copied(module.student)


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start_of(module, position, grid):
    """The teacher's start, float64, of trajectories that set out with these positions."""
    return TrainingNoise(module.seed, position, module.image_shape).latents.double() * grid[0].item()


# -- grids and the teacher's states -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "published"),
    [
        (2, [80, 10.93, 0.670, 0.006]),
        (3, [80, 19.0, 3.11, 0.268, 0.006]),
        (4, [80, 25.96, 6.79, 1.289, 0.145, 0.006]),
        (5, [80, 31.7, 10.9, 3.11, 0.670, 0.0936, 0.006]),
    ],
)
def test_the_students_levels_are_sfds_and_lie_on_the_teachers_grid(steps, published):
    """Published for the same numbers of evaluations, with the analytic first step."""
    grid = method(steps=steps).grids[steps]
    assert len(grid) == 4 * (len(published) - 1) + 1
    assert grid[::4].tolist() == pytest.approx(published, rel=3e-3)
    assert torch.equal(grid, karras_grid(4 * (steps + 1), 0.006, 80.0))
    assert len(method(steps=steps, afs=False).grids[steps]) == 4 * steps + 1


@pytest.mark.parametrize("options", [{}, {"afs": False}, {"solver": "heun"}, {"teacher_afs": True}], ids=str)
def test_targets_are_the_states_of_one_whole_solve(options):
    """Bit for bit: the solver keeps its history over the intervals, and makes its own first step unless told otherwise."""
    module = method(steps=3, **options)
    walk = Walk(module)
    fit(module, None, walk)
    grid, afs = module.grids[3], module.afs
    assert len(walk.steps) == 12
    for step, found in enumerate(walk.steps):
        begun = walk.steps[step // 3 * 3]["position"]
        x, levels, states = start_of(module, begun, grid), grid, []
        if module.teacher_afs:
            x, levels = analytic_step(x, grid[0].item(), grid[1].item()), grid[1:]
            states.append(x)
        with torch.no_grad():
            states += {"heun": heun, "dpm_solver_pp": dpm_solver_pp}[module.solver](module.teacher.denoiser, x, levels)
        assert len(states) == 4 * (3 + afs)
        expected = states[4 * (step % 3 + afs) + 3].float()
        assert torch.equal(found["target"], expected[:, None])
        assert not found["target"].requires_grad


# -- the walk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked():
    """Twelve steps, four trajectories of three intervals with evaluations."""
    module = method(steps=3)
    walk = Walk(module)
    before, hash_before = copied(module.student), module.teacher.hash
    fit(module, None, walk)
    module.teacher._hash = None
    assert module.teacher.hash == hash_before
    assert all(p.grad is None for p in module.teacher.denoiser.parameters())
    return module, walk, before


def test_one_optimiser_step_for_every_interval(walked):
    module, walk, before = walked
    assert [step["global"] for step in walk.steps] == list(range(12)) == list(range(module.total_steps))
    weights = [before, *(step["weights"] for step in walk.steps)]
    assert not any(equal(a, b) for a, b in pairwise(weights))
    levels = module.grids[3][4::4].float()
    assert [step["sigma"].item() for step in walk.steps] == levels[:-1].tolist() * 4


def test_an_interval_starts_where_the_student_ended_the_last_one(walked):
    module, walk, _ = walked
    levels = module.grids[3][4::4].float()
    for number, step in enumerate(walk.steps):
        interval = number % 3
        if interval == 0:  # a new trajectory, after the analytic step
            grid = module.grids[3]
            start = start_of(module, step["position"], grid)
            assert torch.equal(step["x"], analytic_step(start, grid[0].item(), grid[4].item()).float())
        else:
            assert step["x"] is walk.steps[number - 1]["next"]
        assert not step["x"].requires_grad
        ended = euler_step(step["x"], step["estimates"][:, 0], levels[interval], levels[interval + 1])
        assert torch.equal(step["next"], ended)


def test_a_trajectory_that_overflows_goes_on_from_its_teachers_state():
    """In the second of three intervals, whose step the loss scale skips: the first sample alone."""
    module = method(steps=3, kimg=0.096)
    walk = Walk(module)
    branches = module.student.branches

    def overflowing(x, sigma, labels):
        estimates = branches(x, sigma, labels)
        factor = torch.ones(len(x), 1, 1, 1, 1)
        factor[0] = float("inf") if module.trainer.global_step == 1 else 1.0
        return estimates * factor

    module.student.branches = overflowing
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu")
    fit(module, None, walk, plugins=[plugin])
    _, skipped, last = walk.steps
    assert not torch.tensor(skipped["loss"]).isfinite()
    assert plugin.scaler.get_scale() == 2.0**15
    assert torch.equal(last["x"][0], skipped["target"][0, -1])
    assert (last["x"][1:] != skipped["target"][1:, -1]).any(dim=1).all()
    assert torch.tensor(last["loss"]).isfinite()


def test_the_loss_is_the_l1_distance_summed_over_pixels(walked):
    _, walk, _ = walked
    for step in walk.steps:
        by_hand = [
            sum(abs(a - b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
            for x, y in zip(step["next"], step["target"], strict=True)
        ]
        assert step["loss"] == pytest.approx(sum(by_hand) / 32, rel=1e-5)


def test_the_l2_loss_is_half_the_square():
    module = method(loss="l2", kimg=0.032)
    walk = Walk(module)
    fit(module, None, walk)
    error = walk.steps[0]["next"] - walk.steps[0]["target"][:, 0]
    assert walk.steps[0]["loss"] == pytest.approx(error.square().sum((1, 2, 3)).mean().item() / 2, rel=1e-5)


def test_the_learning_rate_is_a_tenth_after_half_of_the_training(walked):
    _, walk, _ = walked
    assert [step["lr"] for step in walk.steps] == pytest.approx([1e-3] * 6 + [1e-4] * 6)


def test_latents_and_labels_belong_to_the_place_where_a_trajectory_set_out():
    module = method(unet(num_classes=3), steps=3)
    walk = Walk(module)
    fit(module, None, walk)
    assert module.student.training  # with dropout, as released
    for number, step in enumerate(walk.steps):
        begun = walk.steps[number // 3 * 3]["position"]
        assert torch.equal(begun, torch.arange(number // 3 * 96, number // 3 * 96 + 32))
        assert torch.equal(step["labels"], TrainingNoise(0, begun, (1, 8, 8)).labels(3))
    assert len(torch.stack([step["x"] for step in walk.steps[::3]]).unique(dim=0)) == 4


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_sample_takes_an_evaluation_a_step_and_ends_at_sigma_min(steps, afs):
    module = method(steps=steps, afs=afs)
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args[1][0].item()))
    noise = sample_noise(torch.arange(16), (2, 1, 1))
    samples = module.sample(noise)
    assert module.nfe == len(seen) == steps
    levels = karras_grid(4 * (steps + afs))[::4]
    assert seen == pytest.approx([level.log().item() / 4 for level in levels[afs:-1]], rel=1e-5)
    x = 80 * noise.double()
    if afs:  # dx/dsigma is x / sqrt(1 + sigma^2)
        x = x + (levels[1] - 80) * x / (1 + 80**2) ** 0.5
    *_, expected = euler(module.teacher.denoiser, x, levels[afs:])
    assert levels[-1].item() == pytest.approx(0.006)
    torch.testing.assert_close(samples, expected.float(), rtol=0, atol=2e-5)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "precision"), [(1, "32-true"), (2, "bf16-mixed")])
def test_it_beats_euler_steps_on_its_own_levels(steps, precision):
    """The untrained student, of as many evaluations; in energy distance to the mixture."""
    module = method(steps=steps, kimg=40, lr=5e-3, batch_size=128)
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    before = energy_distance(module.sample(noise), real)
    fit(module, None, precision=precision)
    after = energy_distance(module.sample(noise), real)
    assert before > 0.1
    assert after < before / 5


# -- several numbers of steps -----------------------------------------------------------------------------------------


def test_the_number_of_steps_is_drawn_evenly_from_seed_and_place_alone():
    module = method(unet(), steps=[3, 1, 2])
    assert module.choices == [1, 2, 3]
    drawn = [module.drawn_steps(step) for step in range(1500)]  # outside of any trainer: no rank is known here
    shares = torch.bincount(torch.tensor(drawn))[1:] / 1500
    assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / 1500) ** 0.5
    same, other = (method(unet(), steps=[1, 2, 3], seed=seed) for seed in (0, 1))
    assert drawn == [same.drawn_steps(step) for step in range(1500)]
    assert drawn != [other.drawn_steps(step) for step in range(1500)]


@pytest.fixture(scope="module")
def several():
    """SFD-v of 1, 2 or 3 steps, trained for 24 optimiser steps, and its walk."""
    module = method(unet(), steps=[1, 2, 3], kimg=0.192, batch_size=8, lr=1e-2, seed=1)
    walk = Walk(module)
    fit(module, None, walk)
    return module, walk


def test_the_network_is_told_how_many_steps_the_trajectory_has(several):
    module, walk = several
    number = 0
    while number < len(walk.steps):
        count = module.drawn_steps(number)
        for interval, step in enumerate(walk.steps[number : number + count]):
            assert step["told"] == step["drawn"] == count
            assert step["sigma"].item() == module.grids[count][4 * (interval + 1)].float()
        number += count
    assert {step["drawn"] for step in walk.steps} == {1, 2, 3}


def test_it_samples_in_each_number_of_steps_and_no_other(several, tmp_path):
    module, _ = several
    noise, seen, samples = sample_noise(torch.arange(4), (1, 8, 8)), [], []
    hook = module.student.network.register_forward_hook(
        lambda net, args, out: seen.append(net.embed.steps.count.item())
    )
    for steps in (1, 2, 3):
        seen.clear()
        assert module.choose_steps(steps, tmp_path) is None
        samples.append(module.sample(noise))
        assert module.nfe == steps
        assert seen == [steps] * steps
    hook.remove()
    with pytest.raises(ValueError, match=r"steps=4: .* was trained for 1, 2, 3; train one with method.steps="):
        module.choose_steps(4, tmp_path)
    assert module.nfe == 3


def test_its_export_is_a_plain_network_of_the_largest_number(several):
    module, _ = several
    noise = sample_noise(torch.arange(4), (1, 8, 8))
    expected = {}
    for steps in (2, 3):
        module.choose_steps(steps, None)
        expected[steps] = module.sample(noise)
    plain = method(unet(), steps=3)
    plain.student.network.load_state_dict(module.exported())
    torch.testing.assert_close(plain.sample(noise), expected[3], rtol=0, atol=1e-4)
    plain.steps, plain.grids = 2, module.grids
    assert (plain.sample(noise) - expected[2]).abs().max() > 1e-3  # it was told another number there


# -- two stages -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_of_five_steps_teaches_one_of_a_single_step(tmp_path):
    """Its Euler steps, the first of them analytic, are the second teacher's path: the two grids have the same levels."""
    first = method(steps=5, kimg=1.6)
    fit(first, None)
    save_weights(tmp_path / "first.safetensors", first.exported(), {})
    network = exact_teacher(network=BranchingCorrected).denoiser.network
    load_weights(tmp_path / "first.safetensors", network)
    teacher = Teacher("first", network, EDM(), karras)
    options = {"steps": 1, "substeps": 3, "solver": "euler", "teacher_afs": True}
    second = method(teacher, kimg=20, lr=5e-3, **options)
    grid = second.grids[1]
    torch.testing.assert_close(grid, first.grids[5][::4])

    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    with torch.no_grad():
        path = list(second.teacher_path(80 * noise.double(), grid, None))
    states = []
    first.student.register_forward_hook(lambda _, args, out: states.append(args[0]))
    samples = first.sample(noise)
    states.append(samples)
    assert len(path) == len(states) == 6
    for own, as_teacher in zip(states, path, strict=True):
        torch.testing.assert_close(as_teacher.float(), own, rtol=1e-5, atol=1e-4)

    def error():
        return (second.sample(noise) - samples).abs().sum((1, 2, 3)).mean()

    before = error()
    fit(second, None)
    assert error() < before / 3


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "steps", "stop"),
    [(None, 3, 4), (None, 3, 6), (unet, [1, 2, 3], None)],
    ids=["in a trajectory", "between two", "of several numbers"],
)
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, teacher, steps, stop):
    def fresh():
        return method(teacher and teacher(3), steps=steps, batch_size=8, kimg=0.096)

    whole = fresh()
    if stop is None:  # the first step inside of a trajectory of three intervals
        place = number = 0
        while (count := whole.drawn_steps(place)) < 3:
            place += count
        stop, number = place + 2, place
        assert 0 < number < 9
    fit(whole, None)
    stopped = fresh()
    fit(stopped, None, max_steps=stop).save_checkpoint(tmp_path / "stopped.ckpt")
    under_way = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["under_way"]
    assert under_way["x"].shape == (8, *whole.image_shape)
    resumed = fresh()
    fit(resumed, None, resume=tmp_path / "stopped.ckpt")
    assert equal(copied(resumed.student), copied(whole.student))
    assert not equal(copied(stopped.student), copied(whole.student))
    assert torch.equal(resumed.x, whole.x)


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "method.steps must be an integer of at least 1, got 0"),
        ({"steps": []}, "method.steps must be a number of steps, or a list of some"),
        ({"steps": [2, 1, 2]}, r"method.steps=\[2, 1, 2\] names a number twice"),
        ({"steps": [1, 0]}, "method.steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "method.steps must be an integer of at least 1, got 2.5"),
        ({"steps": None}, "method.steps must be an integer of at least 1, got None"),
        ({"steps": [1, "2"]}, "method.steps must be an integer of at least 1, got '2'"),
        ({"substeps": 0}, "method.substeps must be an integer of at least 1, got 0"),
        ({"loss": "lpips"}, "method.loss must be one of l1, l2, huber, got 'lpips'"),
        ({"solver": "rk45"}, "method.solver='rk45' is unknown"),
        (
            {"solver": "euler", "solver_options": {"order": 3}},
            "method.solver_options={'order': 3} do not fit the solver",
        ),
        ({"sigma_min": 0}, "need 0 < sigma_min < sigma_max, got sigma_min=0"),
        ({"sigma_min": 90}, "need 0 < sigma_min < sigma_max, got sigma_min=90"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_a_network_without_an_embedding_has_one_number_of_steps():
    with pytest.raises(ValueError, match="BranchingCorrected has no embedding of the noise level"):
        method(steps=[1, 2])

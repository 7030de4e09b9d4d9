"""SFD against the closed-form teacher: grids, states, the loop over a trajectory, several numbers of steps, two stages."""

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


def method(teacher=None, kimg=0.128, lr=1e-3, batch_size=32, seed=0, **options):
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


class Recorder(pl.Callback):
    """Each update: what its loss was computed from and gave, and the weights and the learning rate before its step."""

    def __init__(self, module):
        self.updates, self.logged = [], []
        interval_loss = module.interval_loss

        def recorded(batch, sigma, taus, ends):
            loss = interval_loss(batch, sigma, taus, ends)
            count = module.student.network.embed.steps.count.item() if len(module.choices) > 1 else None
            self.updates.append(batch | {"sigma": sigma, "end": ends[-1], "loss": loss.item(), "told": count})
            self.updates[-1]["step"] = module.trainer.global_step
            return loss

        module.interval_loss = recorded

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.updates[-1] |= {"lr": optimizer.param_groups[0]["lr"], "weights": copied(module.student)}

    def on_train_batch_end(self, trainer, module, *_):
        self.logged.append(module.means["loss/student"].item())


def recorded(module, **options):
    recorder = Recorder(module)
    fit(module, None, recorder, **options)
    return recorder


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start_of(module, training_step, grid):
    """The teacher's start, float64, of the trajectories of a training step."""
    positions = torch.arange(training_step * module.batch_size, (training_step + 1) * module.batch_size)
    return TrainingNoise(module.seed, positions, module.image_shape).latents.double() * grid[0].item()


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
    assert grid[::4].tolist() == pytest.approx(published, rel=3e-3)
    assert torch.equal(grid, karras_grid(4 * (steps + 1), 0.006, 80.0))
    assert len(method(steps=steps, afs=False).grids[steps]) == 4 * steps + 1


@pytest.mark.parametrize("options", [{}, {"afs": False}, {"solver": "heun"}, {"teacher_afs": True}], ids=str)
def test_targets_are_the_states_of_one_whole_solve(options):
    """Bit for bit: the solver keeps its history over the intervals, and makes its own first step unless told otherwise."""
    module = method(steps=3, kimg=0.064, **options)
    updates = recorded(module).updates
    grid, afs = module.grids[3], module.afs
    assert len(updates) == 6
    for number, update in enumerate(updates):
        x, levels, states = start_of(module, number // 3, grid), grid, []
        if module.teacher_afs:
            x, levels = analytic_step(x, grid[0].item(), grid[1].item()), grid[1:]
            states.append(x)
        with torch.no_grad():
            states += {"heun": heun, "dpm_solver_pp": dpm_solver_pp}[module.solver](module.teacher.denoiser, x, levels)
        assert len(states) == 4 * (3 + afs)
        expected = states[4 * (number % 3 + afs) + 3].float()
        assert torch.equal(update["target"], expected[:, None])
        assert not update["target"].requires_grad


# -- the loop over a trajectory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [True, False])
def test_a_training_step_updates_the_student_in_every_interval_of_a_trajectory(afs):
    """Each update changes the weights, starts where the student ended in the last one, and has SFD's loss."""
    module = method(steps=3, afs=afs)
    begun, hash_before = copied(module.student), module.teacher.hash
    recorder = recorded(module)
    updates = recorder.updates
    module.teacher._hash = None
    assert module.teacher.hash == hash_before
    assert [update["step"] for update in updates] == [step for step in range(4) for _ in range(3)]
    assert module.total_steps == 4
    assert module.student_updates == 12
    assert equal(updates[0]["weights"], begun)
    assert not any(equal(a["weights"], b["weights"]) for a, b in pairwise(updates))
    assert [update["lr"] for update in updates] == pytest.approx([1e-3] * 6 + [1e-4] * 6)

    grid = module.grids[3]
    levels = grid[4 * afs :: 4].float()
    for number, update in enumerate(updates):
        interval = number % 3
        sigma, following = levels[interval], levels[interval + 1]
        assert update["sigma"] == sigma
        if interval == 0:
            start = start_of(module, number // 3, grid)
            start = analytic_step(start, grid[0].item(), grid[4].item()) if afs else start
            assert torch.equal(update["x"], start.float())
        else:
            assert torch.equal(update["x"], updates[number - 1]["end"])
        assert not update["x"].requires_grad
        module.student.load_state_dict(update["weights"])
        with torch.no_grad():
            end = euler_step(update["x"], module.student(update["x"], sigma), sigma, following)
        torch.testing.assert_close(update["end"], end)
        assert update["loss"] == pytest.approx((end - update["target"][:, 0]).abs().sum().item() / 32, rel=1e-4)
    means = [sum(update["loss"] for update in updates[3 * step : 3 * step + 3]) / 3 for step in range(4)]
    assert recorder.logged == pytest.approx(means)


def test_the_l2_loss_is_half_the_square():
    (update, _) = recorded(method(loss="l2", kimg=0.032)).updates
    error = update["end"] - update["target"][:, 0]
    assert update["loss"] == pytest.approx(error.square().sum((1, 2, 3)).mean().item() / 2, rel=1e-5)


def test_micro_batches_are_updated_by_as_the_whole():
    whole, parts = method(steps=3, kimg=0.064), method(steps=3, kimg=0.064)
    parts.micro_batch = 9
    expected, found = recorded(whole), recorded(parts)
    assert found.logged == pytest.approx(expected.logged, rel=1e-4)
    assert [len(update["x"]) for update in found.updates] == [8] * 24
    for number, update in enumerate(expected.updates):
        ends = torch.cat([part["end"] for part in found.updates[4 * number : 4 * number + 4]])
        torch.testing.assert_close(ends, update["end"], rtol=1e-4, atol=1e-3)


def test_a_trajectory_that_overflows_goes_on_from_its_teachers_state():
    """In the second of three intervals, whose update the loss scale skips: the first sample alone."""
    module = method(steps=3, kimg=0.032)
    recorder = Recorder(module)
    branches = module.student.branches

    def overflowing(x, sigma, labels):
        factor = torch.ones(len(x), 1, 1, 1, 1)
        factor[0] = float("inf") if len(recorder.updates) == 1 else 1.0
        return branches(x, sigma, labels) * factor

    module.student.branches = overflowing
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu")
    fit(module, None, recorder, plugins=[plugin])
    _, skipped, last = recorder.updates
    assert not torch.tensor(skipped["loss"]).isfinite()
    assert equal(skipped["weights"], last["weights"])
    assert plugin.scaler.get_scale() == 2.0**15
    assert torch.equal(last["x"][0], skipped["target"][0, -1])
    assert (last["x"][1:] != skipped["target"][1:, -1]).any(dim=1).all()
    assert torch.tensor(last["loss"]).isfinite()


def test_labels_belong_to_the_trajectory_and_dropout_is_on():
    module = method(unet(num_classes=3), steps=3)
    updates = recorded(module).updates
    assert module.student.training  # with dropout, as released
    for number, update in enumerate(updates):
        positions = torch.arange(number // 3 * 32, number // 3 * 32 + 32)
        assert torch.equal(update["label"], TrainingNoise(0, positions, (1, 8, 8)).labels(3))


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


@pytest.mark.parametrize(
    ("steps", "kimg", "precision"), [(1, 12.8, "32-true"), pytest.param(2, 20, "bf16-mixed", marks=pytest.mark.slow)]
)
def test_it_beats_euler_steps_on_its_own_levels(steps, kimg, precision):
    """The untrained student, of as many evaluations; in energy distance to the mixture."""
    module = method(steps=steps, kimg=kimg, lr=5e-3, batch_size=128)
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
    drawn = module.steps_of(range(1500))  # outside of any trainer: no rank is known here
    shares = torch.bincount(torch.tensor(drawn))[1:] / 1500
    assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / 1500) ** 0.5
    same, other = (method(unet(), steps=[1, 2, 3], seed=seed) for seed in (0, 1))
    assert drawn == same.steps_of(range(1500))
    assert drawn != other.steps_of(range(1500))
    assert module.evaluations == {"student": 2.0, "teacher": 12.0}


@pytest.fixture(scope="module")
def several():
    """SFD-v of 1, 2 or 3 steps, trained for 12 batches of trajectories, and its updates."""
    module = method(unet(), steps=[1, 2, 3], kimg=0.096, batch_size=8, lr=1e-2, seed=1)
    return module, recorded(module).updates


def test_the_network_is_told_how_many_steps_the_trajectory_has(several):
    module, updates = several
    counts = module.steps_of(range(12))
    assert set(counts) == {1, 2, 3}
    assert module.student_updates == sum(counts) == len(updates)
    intervals = [(step, count, interval) for step, count in enumerate(counts) for interval in range(count)]
    for update, (step, count, interval) in zip(updates, intervals, strict=True):
        assert (update["step"], update["told"]) == (step, count)
        assert update["sigma"].item() == module.grids[count][4 * (interval + 1)].float()


def test_it_samples_in_each_number_of_steps_and_exports_a_plain_network_for_it(several, tmp_path):
    module, _ = several
    noise, seen = sample_noise(torch.arange(4), (1, 8, 8)), []
    hook = module.student.network.register_forward_hook(
        lambda net, args, out: seen.append(net.embed.steps.count.item())
    )
    for steps in (1, 2, 3):
        seen.clear()
        assert module.choose_steps(steps, tmp_path) is None
        samples = module.sample(noise)
        assert module.nfe == steps
        assert seen == [steps] * steps
        plain = method(unet(), steps=steps)
        plain.student.network.load_state_dict(module.exported())
        torch.testing.assert_close(plain.sample(noise), samples, rtol=0, atol=1e-4)
    hook.remove()
    with pytest.raises(ValueError, match="steps=4: the student takes 3, 2, 1, and no other number"):
        module.choose_steps(4, tmp_path)
    assert module.nfe == 3


# -- two stages -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_of_five_steps_teaches_one_of_a_single_step(tmp_path):
    """Its Euler steps, the first of them analytic, are the second teacher's path: the two grids have the same levels."""
    first = method(steps=5, kimg=0.32)
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


@pytest.mark.parametrize(("teacher", "steps"), [(None, 3), (unet, [1, 2, 3])])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, teacher, steps):
    def fresh():
        return method(teacher and teacher(3), steps=steps, batch_size=8, kimg=0.048)

    whole, stopped, resumed = fresh(), fresh(), fresh()
    fit(whole, None)
    fit(stopped, None, max_steps=2).save_checkpoint(tmp_path / "stopped.ckpt")
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student"}
    fit(resumed, None, resume=tmp_path / "stopped.ckpt")
    assert equal(copied(resumed.student), copied(whole.student))
    assert not equal(copied(stopped.student), copied(whole.student))


def test_a_checkpoint_from_inside_a_trajectory_is_refused():
    """Of earlier versions, whose training step was an interval; one whose training was done is as good as any."""
    module = method()
    with pytest.raises(ValueError, match="one interval of a trajectory .* choose another name="):
        module.on_load_checkpoint({"under_way": {}, "global_step": 3})
    module.on_load_checkpoint({"under_way": {}, "global_step": 4})


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

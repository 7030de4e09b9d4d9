"""Progressive distillation against the closed-form teacher: its targets, weights, rounds, kept students and misuse."""

import json
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks import EMA
from closed_forms import (
    MEANS,
    BranchingCorrected,
    ExactNetwork,
    Mixture,
    MixtureData,
    energy_distance,
    exact_teacher,
    fit,
)
from lightning_modules import ProgressiveDistillation
from lightning_modules.progressive import WEIGHTINGS
from stillhouse.diffusion.preconditioning import EDM, X0, Epsilon, V
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import cosine_uniform, ddim_uniform, karras
from stillhouse.diffusion.solvers import euler
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise

PRECONDITIONINGS = {
    "edm": (EDM, karras),
    "v": (V, cosine_uniform),
    "x0": (X0, cosine_uniform),
    "epsilon": (Epsilon, ddim_uniform),
}


def teacher_of(family, mixture=None):
    preconditioning, schedule = PRECONDITIONINGS[family]
    return Teacher(family, BranchingCorrected(ExactNetwork(family, mixture or Mixture())), preconditioning(), schedule)


def method(teacher=None, kimg=1.0, lr=1e-3, batch_size=128, **options):
    torch.manual_seed(0)
    options = {"start_steps": 16} | options
    teacher = teacher or exact_teacher(network=BranchingCorrected)
    common = {"name": "progressive", "batch_size": batch_size, "seed": 0, "kimg": kimg, "lr": lr}
    return ProgressiveDistillation(teacher, **common, **options)


def alone(module):
    """The module outside of a trainer, in its first round."""
    module.log_dict = lambda values: None
    module.table = module.levels()
    return module


def batch(count, first=0):
    images = Mixture().sample(count, torch.Generator().manual_seed(3)).float()
    return {"image": images, "position": torch.arange(first, first + count)}


class Exact(nn.Module):
    """The closed-form denoiser in double precision throughout."""

    def forward(self, x, sigma, labels=None):
        return Mixture()(x, sigma)


def of_levels(module, copies=4):
    """Noised images at every level of the student: x (N copies, 2, 1, 1), float64, and the rows of levels."""
    sigmas = module.levels().repeat(copies, 1)
    images = Mixture().sample(len(sigmas), torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(len(sigmas)), (2, 1, 1)).double()
    return images + sigmas[:, 0, None, None, None] * noise, sigmas


# -- the target -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("family", ["edm", "v"])
def test_one_step_with_the_target_lands_where_the_teachers_steps_do(family, factor):
    module = method(teacher_of(family), factor=factor)
    x, sigmas = of_levels(module)
    target = module.targets(x, sigmas, None)[:, -1]
    assert target.dtype == torch.float64
    for i in range(len(x)):
        *_, last = euler(module.guide, x[i : i + 1], sigmas[i])
        (state,) = euler(lambda *_, i=i: target[i : i + 1], x[i : i + 1], sigmas[i, [0, -1]])
        torch.testing.assert_close(state, last, rtol=0, atol=1e-10)


def test_the_target_is_the_papers_in_its_own_variables():
    """z_t = a_t x + s_t e on the cosine schedule: two DDIM steps, inverted; at i = 1 the teacher's last estimate."""
    n = 8
    module = method(teacher_of("v"), start_steps=2 * n)
    module.guide = Exact()
    x, sigmas = of_levels(module, copies=1)
    low, high = math.atan(math.exp(-10)), math.atan(math.exp(10))

    def process(u):
        log_snr = -2 * math.log(math.tan((high - low) * u + low))
        return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))

    def estimate(z, a, s):
        return Mixture()(z / a, torch.tensor(s / a, dtype=torch.float64))

    for row, i in enumerate(range(n, 0, -1)):
        t = i / n
        (a, s), (a1, s1), (a2, s2) = (process(u) for u in (t, t - 0.5 / n, t - 1 / n))
        z = a * x[row : row + 1]
        first = estimate(z, a, s)
        z1 = a1 * first + s1 / s * (z - a * first)
        last = estimate(z1, a1, s1)
        z2 = a2 * last + s2 / s1 * (z1 - a1 * last)
        expected = last if i == 1 else (z2 - s2 / s * z) / (a2 - s2 / s * a)
        found = module.targets(x[row : row + 1], sigmas[row : row + 1], None)[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_target_lies_between_the_teachers_two_estimates():
    """(1 - g) D(x) + g D(x'): g = (1 - s''/s') / (1 - s''/s), about a half away from small noise, and 1 in the last step."""
    n = 32
    module = method(teacher_of("v"), start_steps=2 * n)
    module.guide = Exact()
    x, sigmas = of_levels(module)
    first = module.guide(x, sigmas[:, 0])
    second = module.guide(
        torch.cat([next(euler(module.guide, x[i : i + 1], sigmas[i])) for i in range(len(x))]), sigmas[:, 1]
    )
    g = (1 - sigmas[:, 2] / sigmas[:, 1]) / (1 - sigmas[:, 2] / sigmas[:, 0])
    mixed = first + g[:, None, None, None] * (second - first)
    torch.testing.assert_close(module.targets(x, sigmas, None)[:, 0], mixed, rtol=0, atol=1e-10)
    g = g[:n]  # from the highest level, i = n .. 1
    assert (g[:-1] > 0.5 - 1e-4).all()
    assert (g[:-4] < 0.56).all()
    assert (g[:-1] < 2 / 3 + 1e-3).all()
    assert g[-1] == 1


# -- the loss ---------------------------------------------------------------------------------------------------------


def network_errors(module, data):
    """Of each sample of a batch: the mean squared errors of x0, noise and v that the network's own prediction implies."""
    random = TrainingNoise(0, data["position"], (2, 1, 1))
    sigmas = module.levels()[random.indices(module.steps)]
    sigma = sigmas[:, 0, None, None, None]
    x = data["image"].double() + sigma * random.noise
    target = module.targets(x, sigmas, None)[:, 0]
    a = (1 + sigma**2).rsqrt()
    s = sigma * a
    coefficients = module.student.preconditioning(sigma)
    predicted = module.student.network((a * x).float(), coefficients.noise.flatten().float()).double()
    noise = (a * x - a * target) / s
    if isinstance(module.student.preconditioning, Epsilon):
        x0, e = (a * x - s * predicted) / a, predicted
        v = a * e - s * x0
    else:
        v = predicted
        x0, e = a * (a * x) - s * v, s * (a * x) + a * v
    errors = (x0 - target, e - noise, v - (a * noise - s * target))
    return [error.square().flatten(1).mean(1) for error in errors]


@pytest.mark.parametrize(
    ("family", "weighting", "expected"),
    [
        ("v", "truncated_snr", lambda x, e, v: torch.maximum(x, e)),
        ("v", "snr_plus_one", lambda x, e, v: v),
        ("v", "snr", lambda x, e, v: e),
        ("epsilon", "snr", lambda x, e, v: e),
    ],
)
def test_the_loss_is_the_mean_squared_error_of_what_the_weighting_stands_for(family, weighting, expected):
    module = alone(method(teacher_of(family), weighting=weighting))
    with torch.no_grad():
        for parameter in module.student.network.last.parameters():
            parameter.normal_(std=0.3)
    data = batch(64)
    loss = module.training_step(data, 0)
    torch.testing.assert_close(loss, expected(*network_errors(module, data)).mean().float(), rtol=1e-3, atol=0)


def test_the_loss_by_hand():
    """w |target - D_student|^2, a mean over pixels and batch."""
    module = alone(method())
    data = batch(16, first=5)
    random = TrainingNoise(0, data["position"], (2, 1, 1))
    total = 0.0
    for j in range(16):
        sigmas = module.levels()[random.indices(8)[j]]
        x = data["image"][j : j + 1].double() + sigmas[0] * random.noise[j : j + 1]
        target = module.targets(x, sigmas[None], None)[0, 0]
        error = target - module.student(x, sigmas[0])[0]
        total += max(1 / sigmas[0].item() ** 2, 1) * error.square().mean().item()
    assert module.training_step(data, 0).item() == pytest.approx(total / 16, rel=1e-5)


def test_a_student_starts_with_a_small_loss_whatever_its_teacher_predicts():
    """The same as in exact arithmetic, and under its level for an estimate of no use (the images' variance, weight 1)."""
    for family in ("edm", "v", "x0"):
        module = alone(method(teacher_of(family)))
        loss = module.training_step(batch(512), 0)
        exact = alone(method(teacher_of(family)))
        exact.guide = Exact()
        exact.student.branches = lambda x, sigma, labels: Mixture()(x, sigma)[:, None]
        assert 0 < loss.item() < 0.05
        torch.testing.assert_close(loss, exact.training_step(batch(512), 0), rtol=1e-2, atol=0)


def test_labels_reach_the_student_and_its_teacher():
    module = alone(method(exact_teacher(network=BranchingCorrected, steps=16)))
    labels, seen = torch.tensor([2, 0, 1, 1]), []
    for denoiser in (module.guide, module.student):
        denoiser.network.register_forward_hook(lambda _, args, out: seen.append(args[2]))
    module.training_step(batch(4) | {"label": labels}, 0)
    assert len(seen) == 3
    assert all(torch.equal(found, labels) for found in seen)


# -- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "factor"), [(32, 2), (64, 4)])
@pytest.mark.parametrize("family", ["v", "edm"])
def test_every_level_is_one_of_the_first_teachers(family, start, factor):
    teacher = teacher_of(family)
    module = method(teacher, start_steps=start, factor=factor)
    grid = teacher.sigmas(start)
    assert module.rounds == [start // factor**n for n in range(1, int(math.log(start, factor) + 0.5) + 1)]
    for number, steps in enumerate(module.rounds):
        module.round = number
        levels = module.levels()
        stride = start // (steps * factor)
        assert levels.shape == (steps, factor + 1)
        for i in range(steps):
            for k in range(factor + 1):
                assert levels[i, k] == grid[(i * factor + k) * stride]
        assert torch.equal(levels[:-1, -1], levels[1:, 0])
        assert levels[-1, -1] == 0
        assert levels[0, 0] == grid[0]


def test_every_level_is_trained_as_often():
    module = alone(method())
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args[1]))
    count = 40_000
    with torch.no_grad():
        module.training_step(batch(count), 0)
    values, counts = seen[0].unique(return_counts=True)
    torch.testing.assert_close(values, module.levels()[:, 0].log().div(4).sort().values.float())
    assert (counts / count - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 * 7 / 8 / count)


# -- rounds -----------------------------------------------------------------------------------------------------------


class Diary(pl.Callback):
    """Of each training step: the learning rate, how much Adam knows, and copies of the networks before and after it."""

    def __init__(self):
        self.days, self.after = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        day = {"lr": optimizer.param_groups[0]["lr"], "known": len(optimizer.state), "nfe": module.nfe}
        day["guide"], day["student"] = copied(module.guide), copied(module.student)
        day["progress"] = module.progress
        self.days.append(day)

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append(copied(module.student))


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SHORT = {"kimg": 24 * 32 / 1000, "batch_size": 32}  # 24 steps


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """A run of 24 steps in rounds of 8, 4, 2 and 1 steps, its diary and its folder."""
    module, diary = method(**SHORT), Diary()
    before = module.teacher.hash
    folder = tmp_path_factory.mktemp("rounds")
    trainer = fit(module, MixtureData(32), diary, default_root_dir=folder, gradient_clip_val=1.0)
    module.teacher._hash = None
    assert module.teacher.hash == before
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, diary, folder


def test_rounds_share_the_budget_and_the_last_two_get_twice_as_much(rounds):
    module, diary, _ = rounds
    assert module.rounds == [8, 4, 2, 1]
    assert module.ends == [4, 8, 16, 24]
    assert [day["nfe"] for day in diary.days] == [8] * 4 + [4] * 4 + [2] * 8 + [1] * 8
    assert method(kimg=3.072, long_rounds=0).ends == [6, 12, 18, 24]
    assert method(kimg=3.072, end_steps=4).ends == [12, 24]


def test_the_learning_rate_falls_from_its_peak_to_zero_in_each_round(rounds):
    _, diary, _ = rounds
    expected = [1e-3 * (1 - j / n) for n in (4, 4, 8, 8) for j in range(n)]
    assert [day["lr"] for day in diary.days] == pytest.approx(expected)
    assert [day["progress"] for day in diary.days] == pytest.approx([j / n for n in (4, 4, 8, 8) for j in range(n)])


def test_each_round_begins_with_a_new_optimiser_and_the_last_rounds_student(rounds):
    _, diary, _ = rounds
    starts = (0, 4, 8, 16)
    assert [step for step, day in enumerate(diary.days) if not day["known"]] == list(starts)
    for start, end in zip(starts, (4, 8, 16, 24), strict=True):
        day = diary.days[start]
        assert equal(day["guide"], day["student"])
        if start:
            assert equal(day["guide"], diary.after[start - 1])
        assert all(equal(day["guide"], later["guide"]) for later in diary.days[start:end])
        assert not equal(day["student"], diary.after[end - 1])


def test_a_checkpoint_holds_the_student_and_its_rounds_teacher_alone(rounds):
    module, _, folder = rounds
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    names = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert names == {"student", "guide"}
    assert checkpoint["round"] == 3
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.student.parameters()}


def test_every_rounds_student_is_kept_and_sampled_with_as_many_evaluations(rounds):
    _, diary, folder = rounds
    noise = sample_noise(torch.arange(8), (2, 1, 1))
    chosen = method(**SHORT)
    for number, (steps, end) in enumerate(zip((8, 4, 2, 1), (4, 8, 16, 24), strict=True), 1):
        card = json.loads((folder / "rounds" / f"{steps}.json").read_text())
        facts = {"method": "progressive", "steps": steps, "round": number, "seed": 0, "teacher": "mixture"}
        assert card.items() >= facts.items()
        assert chosen.choose_steps(steps, folder) == "raw"
        assert chosen.nfe == steps
        assert equal(chosen.student.state_dict(), diary.after[end - 1])
        seen = []
        hook = chosen.student.network.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[1][0]))
        samples = chosen.sample(noise)
        hook.remove()
        torch.testing.assert_close(torch.stack(seen), chosen.levels()[:, 0].log().div(4).float())
        assert samples.dtype == torch.float32
        assert samples.isfinite().all()
    assert len(list((folder / "rounds").iterdir())) == 8


def test_students_that_are_not_there_are_refused(rounds, tmp_path):
    module, _, folder = rounds
    with pytest.raises(ValueError, match=r"steps=3: .* has students of 8, 4, 2, 1 steps so far"):
        module.choose_steps(3, folder)
    with pytest.raises(ValueError, match="steps=2: .* has students of no steps so far"):
        module.choose_steps(2, tmp_path)


@pytest.mark.parametrize("stop", [6, 8, 20])
def test_a_resumed_run_repeats_an_uninterrupted_one(rounds, tmp_path, stop):
    """Stopped in a round, and where one has just ended."""
    _, diary, _ = rounds
    options = {"default_root_dir": tmp_path, "gradient_clip_val": 1.0}
    fit(method(**SHORT), MixtureData(32), max_steps=stop, **options).save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = method(**SHORT)
    fit(resumed, MixtureData(32), resume=tmp_path / "stopped.ckpt", **options)
    assert equal(copied(resumed.student), diary.after[-1])
    assert (tmp_path / "rounds" / "1.safetensors").exists()


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["edm", "v"])
def test_an_untrained_student_samples_as_its_teacher_does_and_may_clip(family):
    """Of data beyond [-1, 1]: Euler steps over its levels, with the estimates as they are or clipped."""
    teacher = teacher_of(family, Mixture(2 * MEANS))
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    grid = teacher.sigmas(16)[::2]
    start = noise.double() * teacher.denoiser.preconditioning.prior_std(grid[0]).item()
    *_, plain = euler(teacher.denoiser, start, grid)
    *_, clipped = euler(lambda *inputs: teacher.denoiser(*inputs).clamp(-1, 1), start, grid)
    assert plain.abs().max() > 1.2
    torch.testing.assert_close(method(teacher, clip=False).sample(noise), plain.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(method(teacher).sample(noise), clipped.float(), rtol=0, atol=1e-5)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_students_beat_the_teacher_at_their_number_of_steps(tmp_path, precision):
    """In energy distance to the mixture; the teacher takes Euler steps over the student's own levels."""
    module = method(kimg=128, lr=1e-2, batch_size=256, long_rounds=0, clip=False)
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    fit(module, MixtureData(256), default_root_dir=tmp_path, gradient_clip_val=1.0, precision=precision)
    for steps, factor in ((4, 4), (2, 6), (1, 10)):
        module.choose_steps(steps, tmp_path)
        grid = torch.cat([module.levels()[:, 0], torch.zeros(1)])
        *_, undistilled = euler(module.teacher.denoiser, 80 * noise.double(), grid)
        before, after = energy_distance(undistilled, real), energy_distance(module.sample(noise), real)
        assert after < before / factor


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_steps": 12}, "method.start_steps=12 divided by method.factor=2 again and again does not come to "),
        ({"start_steps": 12}, "method.end_steps=1: make it 1 times a power of 2"),
        ({"end_steps": 3}, "does not come to method.end_steps=3: make it 3 times a power of 2"),
        ({"end_steps": 16}, "does not come to method.end_steps=16"),
        ({"start_steps": 0}, "method.start_steps must be an integer of at least 1, got 0"),
        ({"factor": 1}, "method.factor must be an integer of at least 2, got 1"),
        ({"long_rounds": -1}, "method.long_rounds must be an integer of at least 0, got -1"),
        ({"kimg": 0.384}, "method.kimg gives 3 training steps, too few for 4 rounds; raise it"),
        ({"weighting": "sigmoid"}, "method.weighting must be one of truncated_snr, snr_plus_one, snr, got 'sigmoid'"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_a_network_that_predicts_the_noise_needs_the_weighting_of_its_own_error():
    for weighting in ("truncated_snr", "snr_plus_one"):
        with pytest.raises(ValueError, match=f"method.weighting={weighting} diverges .* use method.weighting=snr"):
            method(teacher_of("epsilon"), weighting=weighting)
    assert method(teacher_of("epsilon"), weighting="snr").weighting == "snr"
    assert set(WEIGHTINGS) == {"truncated_snr", "snr_plus_one", "snr"}


def test_a_schedule_that_merges_steps_is_refused():
    teacher = exact_teacher()
    teacher.schedule = lambda steps: karras(min(steps, 5))
    with pytest.raises(ValueError, match="method.start_steps=16: the teacher's schedule has 5 steps there"):
        method(teacher)


def test_an_average_is_refused(tmp_path):
    with pytest.raises(ValueError, match="several rounds: set callbacks.ema=null"):
        fit(method(**SHORT), MixtureData(32), EMA({"decay": 0.9}), default_root_dir=tmp_path)

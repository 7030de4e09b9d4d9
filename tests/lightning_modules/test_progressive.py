"""Progressive distillation against the closed-form teacher: its targets, weights, rounds, kept students and misuse."""

import json
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks import EMA, Checkpoints, Clock
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


def rounds_of(module):
    """A method for each round, in order."""
    return [*module.stages().values(), module]


def first_round(*arguments, **options):
    """That of a method, outside of a trainer."""
    module = rounds_of(method(*arguments, **options))[0]
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
    module = first_round(teacher_of(family), factor=factor)
    x, sigmas = of_levels(module)
    target = module.targets(x, sigmas, None)[:, -1]
    assert target.dtype == torch.float64
    for i in range(len(x)):
        *_, last = euler(module.guide.denoiser, x[i : i + 1], sigmas[i])
        (state,) = euler(lambda *_, i=i: target[i : i + 1], x[i : i + 1], sigmas[i, [0, -1]])
        torch.testing.assert_close(state, last, rtol=0, atol=1e-10)


def test_the_target_is_the_papers_in_its_own_variables():
    """z_t = a_t x + s_t e on the cosine schedule: two DDIM steps, inverted; at i = 1 the teacher's last estimate."""
    n = 8
    module = first_round(teacher_of("v"), start_steps=2 * n)
    module.guide.denoiser = Exact()
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
    module = first_round(teacher_of("v"), start_steps=2 * n)
    module.guide.denoiser = Exact()
    x, sigmas = of_levels(module)
    first = module.guide.denoiser(x, sigmas[:, 0])
    second = module.guide.denoiser(
        torch.cat([next(euler(module.guide.denoiser, x[i : i + 1], sigmas[i])) for i in range(len(x))]), sigmas[:, 1]
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
    module = first_round(teacher_of(family), weighting=weighting)
    with torch.no_grad():
        for parameter in module.student.network.last.parameters():
            parameter.normal_(std=0.3)
    data = batch(64)
    loss = module.loss(data)
    torch.testing.assert_close(loss, expected(*network_errors(module, data)).mean().float(), rtol=1e-3, atol=0)


def test_the_loss_by_hand():
    """w |target - D_student|^2, a mean over pixels and batch."""
    module = first_round()
    data = batch(16, first=5)
    random = TrainingNoise(0, data["position"], (2, 1, 1))
    total = 0.0
    for j in range(16):
        sigmas = module.levels()[random.indices(8)[j]]
        x = data["image"][j : j + 1].double() + sigmas[0] * random.noise[j : j + 1]
        target = module.targets(x, sigmas[None], None)[0, 0]
        error = target - module.student(x, sigmas[0])[0]
        total += max(1 / sigmas[0].item() ** 2, 1) * error.square().mean().item()
    assert module.loss(data).item() == pytest.approx(total / 16, rel=1e-5)


def test_a_student_starts_with_a_small_loss_whatever_its_teacher_predicts():
    """The same as in exact arithmetic, and under its level for an estimate of no use (the images' variance, weight 1)."""
    for family in ("edm", "v", "x0"):
        module = first_round(teacher_of(family))
        loss = module.loss(batch(512))
        exact = first_round(teacher_of(family))
        exact.guide.denoiser = Exact()
        exact.student.branches = lambda x, sigma, labels: Mixture()(x, sigma)[:, None]
        assert 0 < loss.item() < 0.05
        torch.testing.assert_close(loss, exact.loss(batch(512)), rtol=1e-2, atol=0)


def test_labels_reach_the_student_and_its_teacher():
    module = first_round(exact_teacher(network=BranchingCorrected, steps=16))
    labels, seen = torch.tensor([2, 0, 1, 1]), []
    for denoiser in (module.guide.denoiser, module.student):
        denoiser.network.register_forward_hook(lambda _, args, out: seen.append(args[2]))
    module.loss(batch(4) | {"label": labels})
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
    for steps, one in zip(module.rounds, rounds_of(module), strict=True):
        levels = one.levels()
        stride = start // (steps * factor)
        assert levels.shape == (steps, factor + 1)
        for i in range(steps):
            for k in range(factor + 1):
                assert levels[i, k] == grid[(i * factor + k) * stride]
        assert torch.equal(levels[:-1, -1], levels[1:, 0])
        assert levels[-1, -1] == 0
        assert levels[0, 0] == grid[0]


def test_every_level_is_trained_as_often():
    module = first_round()
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args[1]))
    count = 40_000
    with torch.no_grad():
        module.loss(batch(count))
    values, counts = seen[0].unique(return_counts=True)
    torch.testing.assert_close(values, module.levels()[:, 0].log().div(4).sort().values.float())
    assert (counts / count - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 * 7 / 8 / count)


# -- rounds -----------------------------------------------------------------------------------------------------------

SHORT = {"kimg": 24 * 32 / 1000, "batch_size": 32}  # 24 steps


class Diary(pl.Callback):
    """Of each training step of all rounds: rate, what Adam knows, positions, and copies of the networks before and after it."""

    def __init__(self):
        self.days = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.days.append({"positions": batch["position"], "known": len(trainer.optimizers[0].state), "nfe": module.nfe})
        self.days[-1] |= {"guide": copied(module.guide.denoiser), "student": copied(module.student)}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.days[-1]["lr"] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, module, *_):
        self.days[-1]["after"] = copied(module.student)


def train(module, folder, *callbacks, ema=None, stop=None, **options):
    """All rounds, as launch/run/build.py trains them; stop: (a round's number, the step in it after which it is killed)."""
    for number, one in enumerate(rounds_of(module)):
        place = folder / f"rounds/{one.steps}" if one is not module else folder
        last = place / "checkpoints/last.ckpt"
        own = [Clock(), *([EMA(ema)] if ema else []), Checkpoints(every_n_steps=1), *callbacks]
        resume = last if last.exists() else None
        options = {"gradient_clip_val": None, "enable_checkpointing": True} | options
        if stop and stop[0] == number:
            return fit(one, MixtureData(one.batch_size), *own, default_root_dir=place, max_steps=stop[1], **options)
        trainer = fit(one, MixtureData(one.batch_size), *own, default_root_dir=place, resume=resume, **options)
        if one is not module:
            last.unlink(missing_ok=True)
    return trainer


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """A run of 24 steps in rounds of 8, 4, 2 and 1 steps, its diary and its folder."""
    module, diary = method(**SHORT), Diary()
    before, folder = module.teacher.hash, tmp_path_factory.mktemp("rounds")
    train(module, folder, diary)
    module.teacher._hash = None
    assert module.teacher.hash == before
    return module, diary.days, folder


def test_of_a_guided_teacher_the_first_round_alone_is_guided(tmp_path):
    guided = exact_teacher(network=BranchingCorrected, guidance=2.0, guide=exact_teacher(Mixture(std=0.5)))
    module, seen = method(guided, **SHORT), {}

    class Estimates(pl.Callback):
        def on_train_start(self, trainer, one):
            x, sigma = torch.randn(4, 2, 1, 1), torch.tensor(0.5)
            is_guided = not torch.equal(one.guide.denoiser(x, sigma), one.guide.unguided(x, sigma))
            seen[one.steps] = (is_guided, one.evaluations["teacher"])

    train(module, tmp_path, Estimates())
    assert seen == {8: (True, 4.0), 4: (False, 2.0), 2: (False, 2.0), 1: (False, 2.0)}
    module.choose_steps(4, tmp_path)  # an earlier student, in the guide's place
    assert module.sampled_student() is module.guide.unguided


def test_rounds_share_the_budget_and_the_last_two_get_twice_as_much(rounds):
    module, days, _ = rounds
    assert module.rounds == [8, 4, 2, 1]
    assert list(module.stages()) == ["rounds/8", "rounds/4", "rounds/2"]
    assert [one.total_steps for one in rounds_of(module)] == [4, 4, 8, 8]
    assert [day["nfe"] for day in days] == [8] * 4 + [4] * 4 + [2] * 8 + [1] * 8
    assert torch.equal(torch.cat([day["positions"] for day in days]), torch.arange(24 * 32))  # one sequence
    assert method(kimg=3.072, long_rounds=0).ends == [6, 12, 18, 24]
    assert method(kimg=3.072, end_steps=4).ends == [12, 24]


def test_each_round_begins_with_a_new_optimiser_as_its_teacher_the_last_rounds_student(rounds):
    _, days, _ = rounds
    starts = (0, 4, 8, 16)
    assert [day["lr"] for day in days] == pytest.approx([1e-3 * (1 - j / n) for n in (4, 4, 8, 8) for j in range(n)])
    assert [step for step, day in enumerate(days) if not day["known"]] == list(starts)
    for start, end in zip(starts, (4, 8, 16, 24), strict=True):
        day = days[start]
        assert equal(day["guide"], day["student"])
        if start:
            assert equal(day["guide"], days[start - 1]["after"])
        assert all(equal(day["guide"], later["guide"]) for later in days[start:end])
        assert not equal(day["student"], days[end - 1]["after"])


def test_every_rounds_student_is_kept_and_sampled_with_as_many_evaluations(rounds):
    module, days, folder = rounds
    noise = sample_noise(torch.arange(8), (2, 1, 1))
    chosen, seen = method(**SHORT), []
    chosen.student.load_state_dict(module.student.state_dict())
    for denoiser in (chosen.student, chosen.guide.denoiser):
        denoiser.network.register_forward_hook(lambda _, args, out: seen.append(args[1][0]))
    for one, end in zip((*rounds_of(chosen), chosen), (4, 8, 16, 24, 24), strict=False):
        seen.clear()
        assert chosen.choose_steps(one.steps, folder) == (None if one is chosen else "raw")
        assert chosen.nfe == one.steps
        assert equal(chosen.exported(), {k.removeprefix("network."): v for k, v in days[end - 1]["after"].items()})
        samples = chosen.sample(noise)
        torch.testing.assert_close(torch.stack(seen), one.levels()[:, 0].log().div(4).float())
        assert samples.dtype == torch.float32
        assert samples.isfinite().all()
    card = json.loads((folder / "rounds/4.json").read_text())
    facts = {"method": "progressive", "steps": 4, "round": 2, "weights": "raw", "seed": 0, "teacher": "mixture"}
    assert card.items() >= facts.items()
    cost = module.preparation(folder)
    assert (cost["steps"], cost["images"]) == (16, 16 * 32)
    assert cost["seconds"] > 0
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student"}


def test_students_that_are_not_there_are_refused(rounds, tmp_path):
    module, _, folder = rounds
    with pytest.raises(ValueError, match=r"steps=3: .* has students of 8, 4, 2, 1 steps"):
        module.choose_steps(3, folder)
    with pytest.raises(ValueError, match="steps=2: .* has students of 1 steps"):
        module.choose_steps(2, tmp_path)


@pytest.mark.parametrize("stop", [(0, 2), (2, 8), (3, 5)], ids=["in a round", "when one was done", "in the last one"])
def test_a_resumed_run_repeats_an_uninterrupted_one(rounds, tmp_path, stop):
    _, days, _ = rounds
    train(method(**SHORT), tmp_path, stop=stop)
    if stop[0] == 2:  # killed before its student was kept
        (tmp_path / "rounds/2.safetensors").unlink()
    diary, resumed = Diary(), method(**SHORT)
    train(resumed, tmp_path, diary)
    assert equal(copied(resumed.student), days[-1]["after"])
    done = sum([4, 4, 8][: stop[0]]) + stop[1]
    assert len(diary.days) == 24 - done  # no round is trained again


def test_the_averaged_student_teaches_the_next_round(tmp_path):
    """Each round averages its own student's weights, from its start on."""
    module, diary = method(**SHORT), Diary()
    train(module, tmp_path, diary, ema={"decay": 0.5}, stop=(1, 1))
    states = [diary.days[0]["student"], *(day["after"] for day in diary.days[:4])]
    average = states[0]
    for state in states[1:]:
        average = {name: (average[name] + value) / 2 for name, value in state.items()}
    start = diary.days[4]
    assert equal(start["guide"], start["student"])
    for name, value in start["guide"].items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    assert not equal(start["guide"], diary.days[3]["after"])
    assert json.loads((tmp_path / "rounds/8.json").read_text())["weights"] == "ema_0.5"
    assert module.choose_steps(8, tmp_path) == "ema_0.5"


def test_a_run_whose_rounds_were_one_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this checkpoint was written when all rounds .* choose another name="):
        method(**SHORT).on_load_checkpoint({"round": 2, "global_step": 9})
    done = {"round": 3, "global_step": 24, "state_dict": {"student.weight": 0, "guide.weight": 0}}
    method(**SHORT).on_load_checkpoint(done)
    assert list(done["state_dict"]) == ["student.weight"]  # a round's teacher comes from its file
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    with pytest.raises(ValueError, match="last.ckpt was written when all rounds .* choose another name="):
        train(method(**SHORT), tmp_path)


def test_rounds_need_a_clock(tmp_path):
    with pytest.raises(ValueError, match="counts its seconds: put callbacks.clock back"):
        fit(rounds_of(method(**SHORT))[0], MixtureData(32), default_root_dir=tmp_path / "rounds/8")


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
    torch.testing.assert_close(first_round(teacher, clip=False).sample(noise), plain.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(first_round(teacher).sample(noise), clipped.float(), rtol=0, atol=1e-5)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_students_beat_the_teacher_at_their_number_of_steps(tmp_path, precision):
    """In energy distance to the mixture; the teacher takes Euler steps over the student's own levels."""
    module = method(kimg=128, lr=1e-2, batch_size=256, long_rounds=0, clip=False)
    module.gradient_clip = 1.0
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    train(module, tmp_path, precision=precision)
    for steps, factor in ((4, 4), (2, 6), (1, 10)):
        module.choose_steps(steps, tmp_path)
        grid = module.grid[:: 16 // steps]
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
        (
            {"start_steps": 1 << 40},
            "1099511627776 solver steps of teacher .*lower them.*: their noise levels would take some .* GB",
        ),
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

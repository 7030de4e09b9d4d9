"""MeanFlow against its formulas, and against Gaussians, whose mean velocities are known exactly."""

from types import SimpleNamespace

import pytest
import torch

from callbacks import EMA
from closed_forms import MEANS, ExactMeanVelocity, Mixture, MixtureData, column, energy_distance, fit, resumed_repeats
from lightning_modules import MeanFlow
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.flow import between, velocity
from stillhouse.diffusion.preconditioning import EDM, Velocity
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, TrainingStream, position_noise, sample_noise
from stillhouse.diffusion.schedules import flow_uniform, karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import MLP
from stillhouse.networks.embeddings import FourierEmbedding

COMMON = {"name": "mean_flow", "batch_size": 16, "seed": 3, "kimg": 40, "lr": 1e-3}
GAUSSIAN = Mixture(MEANS[:1])
BATCH = {"image": Mixture().sample(16, torch.Generator().manual_seed(1)).float(), "position": torch.arange(40, 56)}
KINDS = ("forward", "finite")


def mlp(dropout=0.5, edm=False, weights=True, width=16, blocks=2):
    """A flow whose network has dropout, and no layer that is zero unless it is to be trained."""
    torch.manual_seed(0)
    network = MLP(1, 2, 2, width=width, num_blocks=blocks, dropout=dropout)
    for parameter in network.parameters() if weights else ():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    kind = (EDM(), karras) if edm else (Velocity(), flow_uniform)
    return Teacher("mlp", network, *kind, steps=4)


def mean_flow(teacher=None, step=0, **options):
    """At a training step, outside of a trainer."""
    module = MeanFlow(teacher or mlp(), **(COMMON | options))
    module.trainer = SimpleNamespace(global_step=step)
    return module


def moved(module):
    """The module with a student that is no longer its teacher, and knows the second time."""
    torch.manual_seed(2)
    for parameter in module.student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return module


def drawn(module, batch):
    """t, r, X_t, X_1 - X_0 of a batch, float64."""
    t, r = module.two_times(batch["position"])
    noise = position_noise(3, batch["position"], (2, 1, 1), TrainingStream.NORMALS).double()
    return t, r, between(noise, batch["image"].double(), t), batch["image"] - noise


def latents(count=1024):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_times_are_in_order_and_a_share_is_equal():
    t, r = mean_flow().two_times(torch.arange(20000))
    assert t.dtype == torch.float64
    assert (t <= r).all()
    assert t.min() >= 1e-3
    assert r.max() < 1
    # One pair in four by choice, and of the others those whose second level is the higher one: P(N(-3.4, 2 * 1.6^2) > 0).
    wrong = 0.5 * torch.erfc(torch.tensor(3.4 / 1.6 / 2)).item()
    assert (t == r).double().mean().item() == pytest.approx(0.25 + 0.75 * wrong, abs=0.01)
    level = (1 / t - 1).log()
    assert (level.mean().item(), level.std().item()) == pytest.approx((-0.6, 1.6), abs=0.03)
    assert (mean_flow(equal_share=0.0).two_times(torch.arange(20000))[1] > t).double().mean() > 0.9
    edm = mean_flow(mlp(edm=True), p_mean=5.0).two_times(torch.arange(100))[0]
    assert edm.min().item() == pytest.approx(1 / 81)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_mean_velocity_has_no_loss(kind):
    """u' = u by the identity, at all pairs of times; at equal ones u' is v, whatever the network says."""
    flow = Denoiser(ExactMeanVelocity(GAUSSIAN), Velocity())
    module = mean_flow(derivative=kind, p=0.0)
    module.student = module.sampler.denoiser = flow
    module.loss(BATCH)
    assert module.means["mean_flow/square"] < 1e-4
    assert module.means["mean_flow/change"] > 1e-2
    module = mean_flow(moved(mean_flow()).sampler, derivative=kind, equal_share=0.999999, p=0.0)
    loss = moved(module).loss(BATCH)
    t, _, z, _ = drawn(module, BATCH)
    torch.manual_seed(0)
    module.student.eval()
    expected = (velocity(module.student, z, t) - velocity(module.teacher.denoiser, z, t)).square().flatten(1).sum(1)
    assert module.means["mean_flow/change"] == 0
    module.loss(BATCH)
    torch.testing.assert_close(module.means["mean_flow/square"].double(), expected.mean(), rtol=1e-4, atol=0)
    assert loss > 0


def test_in_training_from_data_the_exact_mean_velocity_is_the_mean_of_its_targets():
    """u - u' of one image is of the size of v; given X_t it vanishes in the mean, and so does its product with X_t."""
    positions = torch.arange(20000)
    images = GAUSSIAN.sample(len(positions), torch.Generator().manual_seed(0)).float()
    module, batch = mean_flow(target="data", p=0.0, p_std=0.01), {"image": images, "position": positions}
    module.student = Denoiser(ExactMeanVelocity(GAUSSIAN), Velocity())
    t, r, z, v = drawn(module, batch)
    exact = module.student.network

    def u(z, t):
        return velocity(module.student, z, t, until=r)

    change = torch.func.jvp(u, (z, t), (column(r - t) * v, r - t))[1]
    error = exact(z, 999 * t, span=r - t) - (v + change)
    size = error.square().mean().sqrt()
    assert size > 0.2
    for weight in (torch.ones_like(z), (z - z.mean(0)) / z.std()):
        assert (error * weight).mean(0).abs().max() < 4 * size / len(positions) ** 0.5
    module.loss(batch)
    assert module.means["mean_flow/square"].item() == pytest.approx(
        error.square().flatten(1).sum(1).mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("target", ["teacher", "data"])
@pytest.mark.parametrize("edm", [False, True])
def test_loss_and_gradient_are_the_papers(target, edm):
    """In the paper's times, s = 1 - t and the end 1 - r, where X_s = (1 - s) x + s e and velocities are -v."""
    module = moved(mean_flow(mlp(0.0, edm), target=target, derivative="forward", p=0.75, c=1e-3))
    t, r, z, v = drawn(module, BATCH)
    s, end = 1 - t, 1 - r

    def u(z, s):
        """Of the estimate D at x = z / (1 - s), sigma = s / (1 - s): on from z by the whole s, z - s u is D."""
        x, sigma, until = z / column(1 - s), s / (1 - s), end / (1 - end)
        return (z - module.student(x, sigma, until=until)) / column(s)

    slope = -v if target == "data" else -velocity(module.teacher.denoiser, z, t)
    _, change = torch.func.jvp(u, (z, s), (slope, torch.ones_like(s)))
    target_value = (slope - column(s - end) * change).detach()
    square = (u(z, s) - target_value).square().flatten(1).sum(1)
    weight = 1 / (square.detach() + 1e-3) ** 0.75
    loss, parameters = module.loss(BATCH), list(module.student.parameters())
    torch.testing.assert_close(loss.double(), (weight * square).mean(), rtol=1e-4, atol=1e-6)
    found, expected = (torch.autograd.grad(each, parameters) for each in (loss, (weight * square).mean()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item() + 1e-7)


def test_both_kinds_agree_with_dropout():
    losses = []
    for kind in KINDS:
        module = moved(mean_flow(mlp(edm=True), derivative=kind))
        torch.manual_seed(4)
        losses.append(module.loss(BATCH).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.manual_seed(5)
    assert module.loss(BATCH).item() != pytest.approx(losses[1], rel=1e-3)


def test_a_label_that_turns_fast_has_differences_that_do_not_see_its_ripples():
    """A ripple of 999 radians is nearly all of the exact derivative; and no state before the first time is read."""
    fast, slow_label = mean_flow(), mean_flow(mlp(edm=True))
    assert (fast.derivative, fast.step) == ("finite", 3e-2)
    assert (slow_label.derivative, slow_label.step) == ("forward", 1e-3)
    ncsnpp = mlp(edm=True)
    ncsnpp.denoiser.network.embed.noise = FourierEmbedding(16)
    assert mean_flow(ncsnpp).derivative == "finite"
    times = []

    class Rippled(ExactMeanVelocity):
        def forward(self, z, noise_labels, class_labels=None, augment_labels=None, span=None):
            times.append(noise_labels / 999)
            return super().forward(z, noise_labels, span=span) + 0.05 * column(noise_labels.sin())

    changes = {}
    for kind in KINDS:
        module = mean_flow(derivative=kind)
        module.student = Denoiser(Rippled(GAUSSIAN), Velocity())
        module.sampler.denoiser = Denoiser(ExactMeanVelocity(GAUSSIAN), Velocity())
        module.loss(BATCH | {"position": torch.arange(2000, 2016)})
        changes[kind] = module.means["mean_flow/change"].item()
    assert changes["forward"] > 50 * changes["finite"]
    module.two_times = lambda position: (torch.full((16,), 1e-3).double(), torch.full((16,), 0.9).double())
    times.clear()
    module.loss(BATCH)
    assert min(time.min().item() for time in times) == pytest.approx(1e-3, rel=1e-4)
    assert max(time.max().item() for time in times) == pytest.approx(1e-3 + 3e-2 * 0.899, rel=1e-4)


@pytest.mark.parametrize(("target", "count"), [("teacher", 1), ("data", 0)])
def test_the_teacher_is_evaluated_for_distillation_alone(target, count):
    module, seen = mean_flow(target=target), []
    module.sampler.denoiser.network.register_forward_hook(lambda *_: seen.append(1))
    module.loss(BATCH)
    assert len(seen) == count == module.evaluations.get("teacher", 0)
    assert module.frozen_networks() == module.learned_teachers() == ([module.sampler] if count else [])
    assert (module.teacher is None) == (target == "data")  # random weights are no measure


# -- training ---------------------------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("edm", "target", "precision", "share"),
    [
        slow(True, "teacher", "32-true", 0.05),
        slow(True, "teacher", "bf16-mixed", 0.05),
        slow(True, "data", "bf16-mixed", 0.05),
        slow(False, "teacher", "bf16-mixed", 0.1),
        slow(False, "data", "32-true", 0.25),
    ],
)
def test_it_learns_the_mixture_and_the_sum_rule(edm, target, precision, share):
    """From nothing, by the exact velocity or by data; X_t + (r - t) u(t, r) is where two jumps by way of s end.

    EDM's label by exact derivatives, and a rectified flow's, which runs to 999, by differences that do not see its ripples.
    """
    real = Mixture().sample(1024, torch.Generator().manual_seed(1))
    options = {
        "batch_size": 128,
        "kimg": 256,
        "lr": 1e-3,
        "seed": 0,
        "warmup_kimg": 2,
        "lr_decay_kimg": 32,
        "equal_share": 0.5,
    }
    # From data |error|^2 varies much in the plane, where its power would pull u from the targets' mean.
    options["p"] = 0.75 if target == "teacher" else 0.0
    module = mean_flow(mlp(0.0, edm, weights=False, width=128), **options, target=target)
    if target == "teacher":
        module.sampler.denoiser = Denoiser(ExactFlow(), Velocity())
    before = energy_distance(module.sample(latents()), real)
    # The average is measured, as in a run: the last weights are anywhere, of two seeds one ten times as far off as the other.
    average = EMA({"decay": 0.998})
    fit(module, MixtureData(128), average, precision=precision)
    t, s, r = (torch.full((1024,), value, dtype=torch.float64) for value in (0.1, 0.4, 0.9))
    z = between(latents().double(), real, t)
    with average.applied(module), torch.no_grad():
        one = energy_distance(module.sample(latents()), real)
        module.chosen_nfe = 4
        four = energy_distance(module.sample(latents()), real)
        whole = z + 0.8 * velocity(module.student, z, t, until=r)
        middle = z + 0.3 * velocity(module.student, z, t, until=s)
        parts = middle + 0.5 * velocity(module.student, middle, s, until=r)
    assert before > 0.1  # the network starts at zero
    assert one < share * before
    assert four < 0.2 * before
    assert (whole - parts).square().mean() < 0.05 * (whole - z).square().mean()


class ExactFlow(torch.nn.Module):
    """v of the mixture."""

    def forward(self, z, noise_labels, class_labels=None):
        t = (noise_labels.double() / 999).clamp(1e-3, 1 - 1e-6)
        estimate = Mixture()(z.double() / column(t), 1 / t - 1)
        return ((estimate - z) / column(1 - t)).float()


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    """With dropout."""

    def fresh():
        return mean_flow(batch_size=8, kimg=0.048)

    whole = resumed_repeats(fresh, MixtureData(8), tmp_path)
    assert any("second_time" in name for name in whole.state_dict())


def test_samples_jump_in_equal_spans_of_time():
    module = mean_flow()
    module.student = Denoiser(ExactMeanVelocity(GAUSSIAN), Velocity())
    start = module.sampling()
    assert (start.solver, start.nfe, start.sigmas[-1]) == ("jumps", 1, 0.0)
    assert start.scale == pytest.approx(1000, rel=1e-5)
    times = [1 / (1 + sigma) for sigma in module.sampling(4).sigmas]
    assert times == pytest.approx([0.001 + 0.999 * i / 4 for i in range(5)], rel=1e-5)
    for nfe in (1, 3):
        module.chosen_nfe = nfe
        images = module.sample(latents(512))
        assert energy_distance(images, GAUSSIAN.sample(512, torch.Generator().manual_seed(3))) < 0.01
    assert mean_flow(mlp(edm=True)).sampling().scale == pytest.approx(80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "images"}, "method.target must be one of teacher, data, got 'images'"),
        ({"derivative": "jvp"}, "method.derivative must be one of forward, finite, got 'jvp'"),
        ({"p_std": 0}, "method.p_std must be above 0, got 0"),
        ({"until_std": -1}, "method.until_std must be above 0, got -1"),
        ({"c": 0}, "method.c must be above 0, got 0"),
        ({"p": -1}, "method.p must not be negative, got -1"),
        ({"equal_share": 1}, r"method.equal_share must be in \[0, 1\), got 1"),
        ({"augment": 0.1}, "method.augment is for method.target=data: a teacher's velocities are those of plain"),
        ({"augment": 0.1, "target": "data"}, "augment"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        mean_flow(**options)

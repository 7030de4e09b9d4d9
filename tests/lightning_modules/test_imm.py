"""Inductive moment matching against its formulas in the paper's own variables, and against jumps that are known exactly."""

import math
from types import SimpleNamespace

import pytest
import torch

from closed_forms import MEANS, ExactMeanVelocity, Mixture, MixtureData, column, energy_distance, fit, resumed_repeats
from lightning_modules import IMM
from lightning_modules.imm import squared_mmd
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM, Velocity
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, TrainingStream, position_noise, sample_noise
from stillhouse.diffusion.schedules import flow_uniform, karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import MLP

COMMON = {"name": "imm", "batch_size": 16, "seed": 3, "kimg": 40, "lr": 1e-3}
GAUSSIAN = Mixture(MEANS[:1])
BATCH = {"image": Mixture().sample(16, torch.Generator().manual_seed(1)).float(), "position": torch.arange(48, 64)}
EQUAL = {"k": 1000}  # r = t
REACHES = {"k": 1e-9}  # r = s


def mlp(dropout=0.5, edm=True, weights=True, width=16):
    """A network with dropout, and no layer that is zero unless it is to be trained."""
    torch.manual_seed(0)
    network = MLP(1, 2, 2, width=width, num_blocks=2, dropout=dropout)
    for parameter in network.parameters() if weights else ():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    kind = (EDM(), karras) if edm else (Velocity(), flow_uniform)
    return Teacher("mlp", network, *kind, steps=4)


def imm(teacher=None, **options):
    """With a student that is no longer its teacher, and knows the second time."""
    module = IMM(teacher or mlp(), **(COMMON | options))
    module.trainer = SimpleNamespace(global_step=0)
    torch.manual_seed(2)
    for parameter in module.student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return module


def latents(count=1024):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


# -- the loss ---------------------------------------------------------------------------------------------------------


def published_loss(module, batch):
    """The paper's, written in its variables: x_t = (1 - t) x0 + t z with z ~ N(0, 1/4), a loop over groups and pairs.

    With EDM's preconditioning f = c_skip x_t + c_out F and F = (c x_t - D) / c', as of the released code's `simple_edm`.
    """
    M = module.group_size
    s, t = module.times(batch["position"][::M])
    eta = torch.maximum(s / (1 - s), t / (1 - t) - 160 / 2**module.k)
    r = eta / (1 + eta)
    images = batch["image"].double()
    z = 0.5 * position_noise(3, batch["position"], (2, 1, 1), TrainingStream.NORMALS).double()

    def f(x, t, s):
        t, s = (column(value.repeat_interleave(M)) for value in (t, s))
        estimate = module.student(x / (1 - t), (t / (1 - t) / 2).flatten(), until=(s / (1 - s) / 2).flatten())
        size = (1 - t) ** 2 + t**2
        output = ((1 - t) * x / size - estimate) * size.sqrt() / (t / 2)
        return ((1 - t) * (1 - s) + t * s) / size * x - ((1 - s) * t - (1 - t) * s) / size.sqrt() / 2 * output

    def state(t):
        t = column(t.repeat_interleave(M))
        return (1 - t) * images + t * z

    y = f(state(t), t, s).reshape(-1, M, 2)
    with torch.no_grad():
        target = f(state(r), r, s).reshape(-1, M, 2)
    total = 0
    for g in range(len(t)):
        c_out = ((1 - s[g]) * t[g] - (1 - t[g]) * s[g]) / ((1 - t[g]) ** 2 + t[g] ** 2).sqrt() / 2

        def kernel(a, b, c_out=c_out):
            return torch.exp(-(a - b).norm().clamp_min(1e-8) / 2 / c_out)

        mmd = sum(
            kernel(y[g, i], y[g, j]) + kernel(target[g, i], target[g, j]) - 2 * kernel(y[g, i], target[g, j])
            for i in range(M)
            for j in range(M)
        )
        snr = 2 * ((1 - t[g]) / t[g]).log()
        slope = 2 / (1 - t[g]) + 2 / t[g]
        weight = torch.sigmoid(module.b - snr) * slope / 2 * (1 - t[g]) ** module.a / ((1 - t[g]) ** 2 + t[g] ** 2)
        total = total + weight * mmd / M**2
    return total / len(t)


@pytest.mark.parametrize("options", [{}, {"group_size": 2, "k": 9, "a": 2, "b": 4}, {"group_size": 1}, REACHES])
def test_loss_and_gradient_are_the_papers(options):
    """M = 1 among them, where it is 2 w (1 - k(y, y')), a consistency loss."""
    module = imm(mlp(dropout=0.0), **options)
    ours, theirs = module.loss(BATCH), published_loss(module, BATCH)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    parameters = list(module.student.parameters())
    for found, expected in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-7)


def test_squared_mmd_of_two_groups_by_hand():
    """{0, 1} against {0, 3} by k(d) = exp(-d / 2), and equal groups, which have none."""
    y, target = torch.tensor([[0.0, 1.0], [5.0, 2.0]])[..., None], torch.tensor([[0.0, 3.0], [2.0, 5.0]])[..., None]
    k = [math.exp(-d / 2) for d in range(4)]
    expected = (2 + 2 * k[1]) / 4 + (2 + 2 * k[3]) / 4 - 2 * (1 + k[3] + k[1] + k[2]) / 4
    found = squared_mmd(y, target, torch.tensor([2.0, 2.0]))
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-7)


def test_groups_share_their_times_which_are_uniform_and_functions_of_the_place():
    module = imm()
    s, t = module.times(torch.arange(0, 80000, 4))
    assert s.dtype == torch.float64
    assert ((s >= 0.006) & (s < t) & (t <= 0.994)).all()
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert ((s - 0.006) / (t - 0.006)).mean().item() == pytest.approx(0.5, abs=0.01)
    seen = []
    module.student.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args[1], kwargs["until"])), with_kwargs=True
    )
    module.loss(BATCH)
    (start, end), (lower, same) = seen
    assert torch.equal(end, same)
    assert all(len(set(levels.tolist())) == 4 for levels in (start, end, lower))
    assert torch.equal(start, start[::4].repeat_interleave(4))
    decrement = 0.5 * 160 / 2**12
    torch.testing.assert_close(lower, torch.maximum(end, start - decrement), rtol=1e-12, atol=0)
    half = {name: values[8:] for name, values in BATCH.items()}
    module.loss(half)
    assert torch.equal(seen[2][0], start[8:])


def test_a_jump_to_its_own_time_is_none_and_one_from_the_same_time_has_no_loss():
    """r = s: the target is the state at s, whatever the network says. r = t, M = 1: both passes are one, with equal masks."""
    module, noise = imm(**REACHES), latents(16).double()
    levels = torch.tensor([0.5, 1e-3, 30.0, 0.0 + 1e-6], dtype=torch.float64)
    images = BATCH["image"].double()
    same = module.jump(images, noise, levels, levels, None).flatten(0, 1)
    assert torch.equal(same, images + column(levels.repeat_interleave(4)) * noise)
    assert imm(**EQUAL, group_size=1).loss(BATCH) == 0
    assert imm(group_size=1).loss(BATCH) > 0


def test_exact_jumps_match_where_a_denoisers_do_not():
    """In a large group of Gaussian data, from nearly all noise to data: of exact ones only the bias, below 2 / M, is left."""
    count = 512
    images = GAUSSIAN.sample(count, torch.Generator().manual_seed(0)).float()
    batch = {"image": images, "position": torch.arange(count)}
    module = imm(mlp(edm=False), batch_size=count, group_size=count, **REACHES)
    module.times = lambda position: (torch.tensor([0.01]).double(), torch.tensor([0.98]).double())
    module.student = Denoiser(ExactMeanVelocity(GAUSSIAN), Velocity())
    module.loss(batch)
    exact = module.means["imm/mmd"].item()
    jump = module.student.network.forward
    module.student.network.forward = lambda z, t, *_, span: jump(z, t, span=torch.zeros_like(span))
    module.loss(batch)
    assert exact < 2 / count
    assert module.means["imm/mmd"] > 10 * exact


def test_micro_batches_have_whole_groups_and_the_gradient_of_all():
    module = imm(mlp(dropout=0.0))
    parameters = list(module.student.parameters())
    whole = torch.autograd.grad(module.loss(BATCH), parameters)
    for most, sizes in ((16, [16]), (9, [8, 8]), (6, [4] * 4), (1, [4] * 4)):
        module.micro_batch = most
        parts = list(module.micro_batches(BATCH))
        assert [len(part["image"]) for part in parts] == sizes
        losses = [len(part["image"]) / 16 * module.loss(part) for part in parts]
        for found, expected in zip(torch.autograd.grad(sum(losses), parameters), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_the_mixture_from_data_alone(precision):
    """From random weights; one jump, and two and four."""
    real = Mixture().sample(1024, torch.Generator().manual_seed(1))
    options = {"batch_size": 128, "kimg": 96, "seed": 0, "warmup_kimg": 2, "group_size": 16}
    module = IMM(mlp(0.0, weights=False, width=128), **(COMMON | options))
    before = energy_distance(module.sample(latents()), real)
    fit(module, MixtureData(128), precision=precision)
    assert before > 0.4
    for nfe in (1, 2, 4):
        module.chosen_nfe = nfe
        assert energy_distance(module.sample(latents()), real) < 0.2 * before


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    """With dropout."""

    def fresh():
        return imm(batch_size=8, kimg=0.048)

    whole = resumed_repeats(fresh, MixtureData(8), tmp_path)
    assert any("second_time" in name for name in whole.state_dict())


# -- samples ----------------------------------------------------------------------------------------------------------


def test_samples_jump_from_the_last_time_to_the_first():
    module = imm()
    one, two, four = (module.sampling(nfe) for nfe in (None, 2, 4))
    assert (one.solver, one.nfe, two.nfe, four.nfe) == ("jumps", 1, 2, 4)
    highest, lowest = 0.5 * 0.994 / 0.006, 0.5 * 0.006 / 0.994
    assert one.sigmas == pytest.approx([highest, lowest])
    assert one.scale == pytest.approx(highest)
    assert two.sigmas == pytest.approx([highest, 0.7, lowest])
    assert [2 * sigma / (1 + 2 * sigma) for sigma in four.sigmas] == pytest.approx([0.994, 0.747, 0.5, 0.253, 0.006])
    assert imm(t_min=0.0).sampling(2).sigmas[-1] == 0
    exact = imm(mlp(edm=False))
    exact.student = Denoiser(ExactMeanVelocity(GAUSSIAN), Velocity())
    for nfe in (1, 2, 3):
        exact.chosen_nfe = nfe
        assert (
            energy_distance(exact.sample(latents(512)), GAUSSIAN.sample(512, torch.Generator().manual_seed(3))) < 0.01
        )


def test_it_begins_as_its_teacher_and_is_measured_beside_one_with_weights():
    teacher = mlp()
    module = IMM(teacher, **COMMON)
    x, sigma = latents(8).double(), torch.full((8,), 0.5)
    module.student.eval()
    for until in (None, sigma / 2):
        assert torch.equal(module.student(x, sigma, until=until), teacher.denoiser(x, sigma))
    assert module.teacher is None  # random weights are no measure
    assert module.sampler is teacher
    assert module.frozen_networks() == module.learned_teachers() == []
    teacher.weights = "weights.safetensors"
    assert IMM(teacher, **COMMON).teacher is teacher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "method.group_size must be an integer of at least 1, got 0"),
        ({"group_size": 3}, "batch_size must be a multiple of method.group_size=3, got 16"),
        ({"sigma_data": 0}, "method.sigma_data must be above 0, got 0"),
        ({"k": -1}, "method.k must be above 0, got -1"),
        ({"t_max": 1}, "need 0 <= method.t_min < method.t_max < 1, got 0.006 and 1"),
        ({"t_min": -0.1}, "need 0 <= method.t_min < method.t_max < 1, got -0.1 and 0.994"),
        (
            {"middle": 90},
            "method.middle must be a noise level between 0.00301811 and 82.8333, or descending ones, got 90",
        ),
        ({"middle": [0.5, 0.7]}, "or descending ones, got .0.5, 0.7."),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        imm(**options)

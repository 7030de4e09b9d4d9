"""Truncated consistency training against its formulas, and against ECT where both say the same."""

from types import SimpleNamespace

import pytest
import torch

from closed_forms import (
    CorrectedByLevel,
    ExactNetwork,
    Mixture,
    MixtureData,
    energy_distance,
    exact_teacher,
    fit,
    resumed_repeats,
)
from launch.run.build import check_fit
from lightning_modules import ECT, TCM
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, sample_noise
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.networks import MLP

COMMON = {"name": "tcm", "batch_size": 16, "seed": 3, "kimg": 40, "lr": 1e-3, "optimizer": "radam"}
BATCH = {"image": Mixture().sample(16, torch.Generator().manual_seed(1)).float(), "position": torch.arange(40, 56)}


def mlp(dropout=0.5):
    """A consistency model whose network has dropout, and no layer that is zero."""
    torch.manual_seed(0)
    network = MLP(1, 2, 2, width=16, num_blocks=2, dropout=dropout)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return Teacher("mlp", network, EDM(), karras, steps=1, solver="renoising")


def at_start(module):
    module.trainer = SimpleNamespace(global_step=0)
    return module


def tcm(teacher=None, **options):
    return at_start(TCM(teacher or mlp(), **(COMMON | {"middle": 4.0} | options)))


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.student.parameters()))


def levels(module, batch=BATCH):
    """The levels t and r of a loss, and where the teacher and the student are evaluated."""
    seen = {"student": [], "teacher": []}
    for name, denoiser in (("student", module.student), ("teacher", module.teacher.denoiser)):
        denoiser.register_forward_hook(lambda _, args, out, name=name: seen[name].append(args[1]))
    module.loss(batch)
    return seen["student"][0], seen["student"][1], seen["teacher"][0]


def test_a_share_is_exactly_at_the_boundary_and_the_others_above():
    module = tcm(boundary=1.5, boundary_share=0.25)
    t, r, frozen = levels(module)
    assert torch.equal(r, frozen)
    assert t[module.at_boundary(BATCH["position"])].tolist() == [1.5] * 4
    assert (t[~module.at_boundary(BATCH["position"])] > 1.5).all()
    assert (r <= t).all()  # t where r is zero, whose answer is the image
    for share in (0.1, 0.25, 0.7):
        module.share = share
        for first in (5, 1 << 31):  # published trainings take billions of images
            count = module.at_boundary(first + torch.arange(1000)).sum()
            assert abs(count - 1000 * share) <= 1


def test_at_the_start_the_loss_is_ects_at_the_same_levels(monkeypatch):
    """The frozen copy is the student, with equal dropout masks: to the last bit, and so are the gradients."""
    module = tcm(boundary_weight=0.25 / 0.75, q=4)
    theirs = at_start(ECT(mlp(), q=4, middle=1.0, **COMMON))
    monkeypatch.setattr(theirs, "levels", module.levels)
    torch.manual_seed(7)
    loss = module.loss(BATCH)
    torch.manual_seed(7)
    expected = theirs.loss(BATCH)
    # With this weight of the boundary all samples count alike: 1 / (B (1 - share)).
    torch.testing.assert_close(0.75 * loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(gradients(loss, module), gradients(expected, theirs), strict=True):
        torch.testing.assert_close(0.75 * a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_the_frozen_model_answers_below_the_boundary_and_the_student_above(c):
    """By hand, with a student that has moved on; the target has no gradient."""
    module = tcm(mlp(0.0), c=c, q=4, boundary=2.0, boundary_weight=0.3)
    for parameter in module.student.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    inputs = []
    handle = module.student.register_forward_hook(lambda _, args, out: inputs.append(args))
    loss = module.loss(BATCH)
    found = gradients(loss, module)
    handle.remove()
    (x_t, t, _), (x_r, r, _) = inputs
    assert 0 < (r < 2.0).sum() < 16
    with torch.no_grad():
        below = (r < 2.0).view(-1, 1, 1, 1)
        target = torch.where(below, module.teacher.denoiser(x_r, r), module.student(x_r, r))
    distance = (module.student(x_t, t) - target).flatten(1).norm(dim=1)
    losses = ((distance**2 + c**2).sqrt() - c) / (t - r)
    at = t == 2.0
    expected = losses[~at].mean() + 0.3 * losses[at].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(module.means["loss/boundary"].double(), losses[at].mean(), rtol=1e-5, atol=0)
    for a, b in zip(found, gradients(expected, module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
    assert not any(p.requires_grad for p in module.teacher.denoiser.parameters())
    assert not module.teacher.denoiser.training
    assert module.student.training


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_the_mixture_from_a_consistency_model(precision):
    """A model that is exact below t' and a denoiser above, where one evaluation of it gives the mean of all."""
    real = Mixture().sample(1024, torch.Generator().manual_seed(1))
    first = at_start(
        ECT(exact_teacher(network=CorrectedByLevel), **(COMMON | {"batch_size": 128, "kimg": 8, "lr": 5e-3}))
    )
    fit(first, MixtureData(128))
    network = CorrectedByLevel(ExactNetwork("edm", Mixture()))
    network.load_state_dict(first.student.network.state_dict())
    teacher = Teacher("ect", network, EDM(), karras, steps=1, solver="renoising")
    module = tcm(teacher, batch_size=128, kimg=32, lr=5e-3, seed=0, q=16)
    noise = sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + 1024), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, MixtureData(128), precision=precision)
    assert energy_distance(module.sample(noise), real) < 0.5 * before


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    def fresh():
        return tcm(batch_size=8, kimg=0.048)

    resumed_repeats(fresh, MixtureData(8), tmp_path)


def test_samples_stay_above_the_boundary():
    module = tcm(boundary=0.5, middle=0.5)
    assert module.sampling(2).sigmas == [80.0, 0.5, 0.0]
    assert module.sampling(5).sigmas[-2] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary": 80}, "method.boundary must lie between 0 and the teacher's highest level 80, got 80"),
        ({"boundary_share": 1}, "method.boundary_share must lie between 0 and 1, got 1"),
        ({"boundary_weight": -1}, "method.boundary_weight must not be negative, got -1"),
        ({"middle": 0.8}, "method.middle must be a noise level between 1 and 80, or descending ones, got 0.8"),
        ({"teacher_step": "heun"}, "method.teacher_step is no option of TCM: leave it out"),
        ({"t_df": 0}, "needs a positive scale and df, got 0.2 and 0"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        tcm(**options)


def test_a_method_learns_from_the_kind_of_teacher_that_it_is_for():
    data = SimpleNamespace(resolution=1, channels=2, num_classes=0, name="mixture")
    check_fit(tcm(), data)
    check_fit(ECT(mlp(), **COMMON), data)  # whose network it begins with
    plain = exact_teacher()
    with pytest.raises(
        ValueError, match="method=tcm goes on from a finished consistency model, and teacher mixture is a"
    ):
        check_fit(tcm(plain), data)
    with pytest.raises(
        ValueError, match="method=tcm learns from the estimates of a diffusion model, and teacher mlp is a c"
    ):
        check_fit(ECT(mlp(), teacher_step="heun", **COMMON), data)

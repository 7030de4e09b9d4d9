"""Guided teachers, against the mixture whose denoisers with and without labels are known exactly."""

import pytest
import torch

from closed_forms import Corrected, ExactNetwork, Mixture, exact_teacher
from stillhouse.diffusion.flow import velocity
from stillhouse.diffusion.preconditioning import Velocity
from stillhouse.diffusion.schedules import flow_uniform, karras
from stillhouse.diffusion.solvers import heun
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.trigflow import angle_of, trigflow_output

X = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
SIGMA = torch.tensor([0.02, 0.1, 0.4, 1.0, 3.0, 20.0], dtype=torch.float64)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # networks answer in float32


class Labelled(Corrected):
    """The mixture's network with a class for each component; share: of hidden labels in training."""

    share = 0.1

    def __init__(self, exact):
        super().__init__(exact)
        self.num_classes, self.label_dropout = 3, self.share


class AlwaysLabelled(Labelled):
    share = 0.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def guided(weight=2.5, interval=None, guide=None, network=Labelled, **options):
    return exact_teacher(
        network=network, guidance=weight, guidance_interval=interval, guide=guide, **({"steps": 4} | options)
    )


def truth(x, sigma, labels, weight, weak=None, seen=None):
    weak = (weak or Mixture())(x, sigma, seen)
    return weak + weight * (Mixture()(x, sigma, labels) - weak)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.5])
def test_class_guidance_is_the_closed_form(weight):
    x = X * SIGMA[:, None, None, None]
    estimate = guided(weight).denoiser(x, SIGMA, LABELS)
    torch.testing.assert_close(estimate, truth(x, SIGMA, LABELS, weight), **CLOSE)
    # Without labels both are one.
    torch.testing.assert_close(guided(weight).denoiser(x, SIGMA), Mixture()(x, SIGMA), **CLOSE)


def test_weight_one_is_the_teacher_itself():
    plain, one = exact_teacher(network=Labelled, steps=4), guided(1.0, (0.1, 3.0))
    one.denoiser.network.load_state_dict(plain.denoiser.network.state_dict())
    assert torch.equal(plain.denoiser(X, SIGMA, LABELS), one.denoiser(X, SIGMA, LABELS))
    assert (plain.hash, plain.form, plain.solver_name, plain.nfe()) == (one.hash, one.form, one.solver_name, one.nfe())
    assert not one.guided
    assert one.evaluations_per_estimate == 1


def test_autoguidance_is_the_closed_form():
    """By a network that takes labels, and by one that takes none."""
    weaker = Mixture(std=0.5)
    for network, seen in ((Labelled, LABELS), (Corrected, None)):
        guide = exact_teacher(weaker, network=network)
        estimate = guided(2.0, guide=guide, network=AlwaysLabelled).denoiser(X, SIGMA, LABELS)
        torch.testing.assert_close(estimate, truth(X, SIGMA, LABELS, 2.0, weaker, seen), **CLOSE)


def test_an_interval_guides_inside_alone():
    teacher = guided(interval=(0.1, 3.0))
    expected = truth(X, SIGMA, LABELS, 2.5)
    plain = teacher.unguided(X, SIGMA, LABELS)
    inside = torch.tensor([False, False, True, True, True, False])  # (0.1, 3]
    estimate = teacher.denoiser(X, SIGMA, LABELS)
    torch.testing.assert_close(estimate[inside], expected[inside], **CLOSE)
    assert torch.equal(estimate[~inside], plain[~inside])
    for i in range(len(X)):  # a level of all samples
        torch.testing.assert_close(teacher.denoiser(X, SIGMA[i], LABELS)[i], estimate[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "heun"},
        {"solver": "dpm_solver_pp", "solver_options": {"order": 3}},
        {"solver": "stochastic_heun", "solver_options": {"s_churn": 4.0}},
    ],
)
@pytest.mark.parametrize("interval", [None, (0.05, 2.0)])
def test_evaluations_of_both_networks_count(options, interval):
    calls = []
    teacher = guided(interval=interval, **options)
    teacher.denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    teacher.sample(X.float(), LABELS, 5)
    plain = exact_teacher(network=Labelled, **options)
    assert teacher.nfe(5) == len(calls)
    assert (teacher.nfe(5) == 2 * plain.nfe(5)) is (interval is None)
    assert plain.nfe(5) < teacher.nfe(5)


def test_samples_follow_the_guided_field():
    teacher = guided()

    def exact(x, sigma, labels):
        return truth(x, sigma, labels, 2.5)

    *_, expected = heun(exact, 80 * X, karras(8), LABELS)
    torch.testing.assert_close(teacher.sample(X, LABELS, 8), expected.float(), rtol=1e-4, atol=1e-4)


def test_a_flow_is_guided_in_its_velocity():
    network = Labelled(ExactNetwork("velocity", Mixture()))
    flow = Teacher("flow", network, Velocity(), flow_uniform, steps=4, guidance=2.5, guidance_interval=(0.3, 3.0))
    t = torch.tensor([0.05, 0.3, 0.5, 0.6, 0.7, 0.9], dtype=torch.float64)
    v = velocity(flow.denoiser, X, t, LABELS)
    per = t[:, None, None, None]
    torch.testing.assert_close(v, (flow.denoiser(X / per, (1 - t) / t, LABELS) - X) / (1 - per), rtol=1e-4, atol=1e-4)


def test_trigflow_is_guided_in_its_velocity():
    teacher, t = guided(interval=(0.2, 5.0)), angle_of(SIGMA, 0.5)
    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    expected = (cos * X - teacher.denoiser(X / cos, SIGMA, LABELS)) / (0.5 * sin)
    torch.testing.assert_close(trigflow_output(teacher.denoiser, X, t, 0.5, LABELS), expected, rtol=1e-4, atol=1e-4)


def test_students_and_copies():
    teacher = guided(guide=exact_teacher(Mixture(std=0.5)))
    student = teacher.student()
    assert torch.equal(student(X, SIGMA, LABELS), teacher.unguided(X, SIGMA, LABELS))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    replica = teacher.replica()
    assert torch.equal(replica.denoiser(X, SIGMA, LABELS), teacher.denoiser(X, SIGMA, LABELS))
    assert replica.hash == teacher.hash
    before = teacher.denoiser(X, SIGMA, LABELS)
    replica.set_guidance(False)
    assert torch.equal(replica.denoiser(X, SIGMA, LABELS), teacher.unguided(X, SIGMA, LABELS))
    assert torch.equal(teacher.denoiser(X, SIGMA, LABELS), before)


def test_each_guidance_is_a_teacher_of_its_own():
    guides = [exact_teacher(network=Corrected), exact_teacher(network=Corrected)]
    for one in guides:
        one.denoiser.network.load_state_dict(guides[0].denoiser.network.state_dict())
    guides[1].denoiser.network.last.bias.data += 1
    teachers = [
        exact_teacher(network=Labelled),
        guided(1.5),
        guided(2.0),
        guided(2.0, (0.1, 3.0)),
        *(guided(2.0, guide=guide) for guide in guides),
    ]
    state = teachers[0].denoiser.network.state_dict()
    for teacher in teachers:
        teacher.denoiser.network.load_state_dict(state)
    assert len({teacher.hash for teacher in teachers}) == len(teachers)
    assert [teacher.solver_name for teacher in teachers[1:5]] == [
        "heun, guidance 1.5",
        "heun, guidance 2",
        "heun, guidance 2 on (0.1, 3]",
        "heun, guidance 2 by mixture",
    ]


def test_weights_rounded_for_autocast_give_the_same_bits(monkeypatch):
    from stillhouse.diffusion import teacher as module

    monkeypatch.setattr(module, "autocast_weights", lambda network: network.layers.parameters())
    teacher = guided(guide=exact_teacher(network=Corrected))
    before = teacher.hash
    teacher.round_weights(torch.bfloat16)
    assert teacher.guide.denoiser.network.layers[0].weight.dtype == torch.bfloat16
    teacher._hash = teacher.guide._hash = None
    assert teacher.hash == before
    teacher.round_weights(None)
    assert teacher.guide.denoiser.network.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: guided(network=AlwaysLabelled),
            "mixture was trained to see all labels .*name a second .*teacher.guide=",
        ),
        (lambda: guided(conditional=False), "mixture takes no labels: name a second network"),
        (lambda: guided(None, guide=exact_teacher()), "teacher.guide needs a weight: say teacher.guidance=1.5"),
        (lambda: guided(None, (0.1, 3.0)), "teacher.guidance_interval needs a weight"),
        (lambda: guided(-1.0), "must not be negative, got -1"),
        (lambda: guided(interval=(3.0, 0.1)), r"teacher.guidance_interval=\[3.0, 0.1\] must be two noise levels"),
        (lambda: guided(solver="renoising"), "mixture is a consistency model"),
        (lambda: exact_teacher(guidance=2.0, guide=exact_teacher(network=Labelled)), "has num_classes=3, teacher .* 0"),
    ],
)
def test_what_can_not_be_guided_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

import pytest
import torch

from closed_forms import Corrected, ExactNetwork, Mixture, exact_teacher, fit
from lightning_modules import DenoisingStudent
from stillhouse.diffusion.preconditioning import Epsilon, ResidualEpsilon, V
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, sample_noise
from stillhouse.diffusion.schedules import cosine_uniform, ddim_quadratic
from stillhouse.diffusion.teacher import Teacher


def method(tmp_path, teacher=None, **options):
    options = {"kimg": 40, "lr": 3e-3, "warmup_kimg": 1, "betas": (0.9, 0.98), "pairs": 2048, "held_out": 256} | options
    return DenoisingStudent(
        teacher or exact_teacher(),
        name="denoising_student",
        batch_size=128,
        seed=0,
        dtype="float32",
        store=str(tmp_path / "trajectories"),
        **options,
    )


def held_out_error(module):
    noise = sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + 512), (2, 1, 1))
    return (module.sample(noise) - module.teacher.sample(noise)).square().flatten(1).sum(1).mean().item()


@pytest.mark.parametrize(
    ("loss", "precision"), [("l2", "32-true"), pytest.param("l1", "bf16-mixed", marks=pytest.mark.slow)]
)
def test_it_learns_the_exact_teachers_map(tmp_path, loss, precision):
    """The untrained student returns the data mean; trained, under a tenth of that error is left on unseen noise."""
    module = method(tmp_path, loss=loss)
    before = held_out_error(module)
    trainer = fit(module, None, precision=precision)
    assert trainer.global_step == module.total_steps == 313
    assert held_out_error(module) < 0.1 * before


@pytest.mark.slow
def test_it_learns_from_an_eps_teacher_in_residual_form(tmp_path):
    network = Corrected(ExactNetwork("epsilon", Mixture()))
    teacher = Teacher("eps", network, Epsilon(), ddim_quadratic, solver="euler", steps=25)
    module = method(tmp_path, teacher, loss="l2")
    assert isinstance(module.student.preconditioning, ResidualEpsilon)
    assert isinstance(teacher.denoiser.preconditioning, Epsilon)
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    expected = noise - network(noise, torch.full((64,), 999.0))
    torch.testing.assert_close(module.sample(noise), expected, rtol=0, atol=1e-4)
    before = held_out_error(module)
    fit(module, None)
    assert held_out_error(module) < 0.1 * before


def test_a_sample_is_one_evaluation_at_the_highest_noise(tmp_path):
    module = method(tmp_path)
    assert module.frozen_networks() == []  # the teacher's samples are stored: no step has a use for it
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args[1]))
    noise = sample_noise(torch.arange(8), (2, 1, 1))
    images = module.sample(noise)
    assert module.nfe == len(seen) == 1
    torch.testing.assert_close(seen[0], torch.full((8,), 80.0).log() / 4)
    # The copy starts as the exact teacher: D(80 z, 80), the data mean to within 1/80.
    torch.testing.assert_close(images, Mixture()(80 * noise, torch.tensor(80.0)), rtol=0, atol=1e-4)


def test_losses_are_the_papers(tmp_path):
    batch = {"noise": sample_noise(torch.arange(4), (2, 1, 1)), "states": torch.rand(4, 1, 2, 1, 1)}
    for loss, expected in (
        ("l2", lambda e: (e**2).sum(dim=(1, 2, 3)).mean() / 2),
        ("l1", lambda e: e.abs().sum(dim=(1, 2, 3)).mean()),
    ):
        module = method(tmp_path, loss=loss)
        module.log = lambda *args, **kwargs: None
        error = module.sample(batch["noise"]) - batch["states"][:, 0]
        torch.testing.assert_close(module.loss(module.prepare(batch)), expected(error))


def test_the_loss_is_not_rounded_at_the_top_of_a_cosine_schedule(tmp_path):
    """Its own images as targets: a float32 step from sigma = 2e4 to zero would be off by 6e-4 here."""
    teacher = Teacher("v", Corrected(ExactNetwork("v", Mixture())), V(), cosine_uniform, solver="euler", steps=16)
    module = method(tmp_path, teacher, loss="l1")
    module.log = lambda *args, **kwargs: None
    noise = sample_noise(torch.arange(512), (2, 1, 1))
    assert module.loss(module.prepare({"noise": noise, "states": module.sample(noise)[:, None]})) < 1e-6


def test_target_noise_changes_the_loss_by_its_variance_alone(tmp_path):
    """E |S - T - s n|^2 / 2 = |S - T|^2 / 2 + d s^2 / 2."""
    count = 50000
    batch = {"noise": sample_noise(torch.arange(count), (2, 1, 1)), "states": torch.rand(count, 1, 2, 1, 1)}
    losses = []
    for target_noise in (0.0, 0.5):
        module = method(tmp_path, loss="l2", target_noise=target_noise)
        module.log = lambda *args, **kwargs: None
        torch.manual_seed(0)
        losses.append(module.loss(module.prepare(batch)).item())
    assert losses[1] - losses[0] == pytest.approx(2 * 0.5**2 / 2, rel=0.03)


def test_only_the_student_is_trained_and_stored(tmp_path):
    module = method(tmp_path, kimg=1)
    before = module.teacher.hash
    fit(module, None)
    module.teacher._hash = None
    assert module.teacher.hash == before
    assert all(key.startswith("student.") for key in module.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l3"}, "method.loss='l3' is unknown; choose one of l1, l2, huber"),
        ({"target_noise": -1}, "method.target_noise must not be negative, got -1"),
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"kimg": -2}, "kimg must be a positive number, got -2"),
        ({"warmup_kimg": -1}, "method.warmup_kimg must not be negative, got -1"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        method(tmp_path, **options)


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'pars'"):
        method(tmp_path, pars=3)

import pytest
import torch
from flow_tools import COMMON, mixture_flow

from closed_forms import Mixture, energy_distance, fit
from lightning_modules import FlowDistillation
from stillhouse.diffusion.flow import between, velocity
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, sample_noise


def distillation(folder, teacher=None, **options):
    options = {"name": "flow_distill", "pairs": 2048, "held_out": 256, "dtype": "float32"} | options
    return FlowDistillation(teacher or mixture_flow(), store=str(folder / "trajectories"), **(COMMON | options))


def latents(count=512):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


def held_out_error(module):
    error = module.sample(latents()) - module.teacher.sample(latents())
    return error.square().flatten(1).sum(1).mean().item()


@pytest.mark.parametrize(
    ("loss", "precision"),
    [
        ("l2", "32-true"),
        ("l1", "32-true"),
        ("huber", "bf16-mixed"),
    ],
)
@pytest.mark.slow
def test_one_step_learns_the_flows_map(tmp_path, loss, precision):
    module = distillation(tmp_path, loss=loss)
    before = held_out_error(module)
    fit(module, None, precision=precision)
    assert held_out_error(module) < 0.15 * before


@pytest.mark.slow
def test_two_steps_come_nearer_to_the_data_than_the_flow_in_two(tmp_path):
    module = distillation(tmp_path, steps=2, kimg=80)
    real = Mixture().sample(512, torch.Generator().manual_seed(1))
    before = energy_distance(module.sample(latents()), real)
    fit(module, None)
    assert energy_distance(module.sample(latents()), real) < 0.5 * before


@pytest.mark.parametrize("steps", [1, 4])
def test_the_loss_is_the_papers(tmp_path, steps):
    module = distillation(tmp_path, steps=steps)
    module.log = lambda *args, **kwargs: None
    torch.nn.init.normal_(module.student.network.last.weight)
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    images = module.teacher.sample(noise)
    batch = {"noise": noise, "states": images[:, None], "position": torch.arange(64)}
    t = module.time(module.times, batch)
    if steps == 1:
        assert (t == 0).all()
        v = module.student.network(noise, torch.full((64,), 999 * 1e-3))
        error = noise + (1 - 1e-3) * v - images
    else:
        assert len(set(t.tolist())) == 4
        clamped = t.clamp_min(1e-3)
        error = velocity(module.student, between(noise, images, t), clamped) - (images - noise)
    torch.testing.assert_close(module.loss(module.prepare(batch)), error.square().sum((1, 2, 3)).mean() / 2)


def test_a_sample_takes_as_many_evaluations_as_steps(tmp_path):
    module = distillation(tmp_path, steps=3)
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args[1][0].item()))
    images = module.sample(latents(4))
    assert module.nfe == len(seen) == 3
    assert images.dtype == torch.float32
    with pytest.raises(ValueError, match="takes 3, and no other number"):
        module.choose_steps(2, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "method.steps"),
        ({"steps": 2, "loss": "lpips"}, "choose l2 or steps=1"),
        ({"loss": "l3"}, "method.loss"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        distillation(tmp_path, **options)

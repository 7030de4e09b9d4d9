import pytest
import torch
from flow_tools import COMMON, Nothing, mixture_flow
from torch import nn

from closed_forms import Mixture, MixtureData, energy_distance, exact_teacher, fit
from datamodules.components.augmentation import augmented
from lightning_modules import RectifiedFlow, Reflow
from stillhouse.diffusion.flow import between, velocity
from stillhouse.diffusion.preconditioning import Velocity
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, position_noise, position_uniforms, sample_noise
from stillhouse.diffusion.schedules import flow_uniform
from stillhouse.diffusion.solvers import euler
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.time_distributions import Start, Uniform
from stillhouse.networks import SongUNet


def rectified_flow(teacher=None, **options):
    options = COMMON | {"times": Uniform(), "name": "rectified_flow"} | options
    return RectifiedFlow(teacher or mixture_flow(base=Nothing()), **options)


def reflow(folder, teacher=None, **options):
    options = {"times": Uniform(), "name": "reflow", "pairs": 2048, "held_out": 256, "dtype": "float32"} | options
    return Reflow(teacher or mixture_flow(), store=str(folder / "trajectories"), **(COMMON | options))


def latents(count=1024):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


def straightness(module):
    """int E|(X_1 - X_0) - v(X_t, t)|^2 dt along the flow's own path, by 64 Euler steps."""
    noise, sigmas = latents(), flow_uniform(64)
    with torch.no_grad():
        path = list(euler(module.student, noise.double() * 1000, sigmas))
        states = [x / (1 + s) for x, s in zip(path[:-1], sigmas[1:-1].tolist(), strict=True)]
        drifts = [
            velocity(module.student, z.float(), torch.full((len(z),), 1 / (1 + s), dtype=torch.float64))
            for z, s in zip(states, sigmas[1:-1].tolist(), strict=True)
        ]
    whole = path[-1] - noise
    return torch.stack([(whole - v).square().sum((1, 2, 3)).mean() for v in drifts]).mean().item()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.slow
def test_it_learns_the_mixture_from_data(precision):
    """From a velocity of zero, whose samples are the noise itself, to near the floor of two real samples."""
    real = [Mixture().sample(1024, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    module = rectified_flow(kimg=100)
    before = energy_distance(module.sample(latents()), real[0])
    fit(module, MixtureData(128), precision=precision)
    after = energy_distance(module.sample(latents()), real[0])
    assert energy_distance(*real) < 0.005
    assert before > 0.1
    assert after < 0.1 * before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_reflow_straightens_and_keeps_the_ends(tmp_path, precision):
    """2-RF of the exact 1-RF: a third of the curvature is left, and one Euler step comes nearer to the data."""
    module = reflow(tmp_path, kimg=80)
    first = straightness(module)
    real = Mixture().sample(1024, torch.Generator().manual_seed(1))
    module.euler_steps = 1
    one_step = energy_distance(module.sample(latents()), real)
    fit(module, None, precision=precision)
    assert straightness(module) < first / 3
    assert energy_distance(module.sample(latents()), real) < one_step / 4
    module.euler_steps = None
    assert energy_distance(module.sample(latents()), real) < 0.02


def test_the_loss_is_the_papers():
    module = rectified_flow()
    module.log = lambda *args, **kwargs: None
    torch.nn.init.normal_(module.student.network.last.weight)
    batch = {"image": torch.rand(8, 2, 1, 1) * 2 - 1, "position": torch.arange(40, 48)}
    noise = position_noise(0, batch["position"], (2, 1, 1), stream=1)
    t = 1e-3 + (1 - 1e-3) * position_uniforms(0, batch["position"], stream=5)[0]
    z = between(noise, batch["image"], t)
    out = module.student.network(z, (999 * t).float())
    expected = (out - (batch["image"] - noise)).square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(module.loss(module.prepare(batch)), expected)


def test_a_flow_of_augmented_images_tells_its_network():
    network = SongUNet(8, 1, 1, augment_dim=9, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    nn.init.normal_(network.embed.augment.weight)
    nn.init.normal_(network.heads["8"].conv.weight)
    teacher = Teacher("digits", network, Velocity(), flow_uniform)
    module, plain = (rectified_flow(teacher, augment=augment) for augment in (0.5, None))
    module.log = lambda *args, **kwargs: None
    batch = {"image": torch.rand(8, 1, 8, 8) * 2 - 1, "position": torch.arange(40, 48)}
    changed = augmented(batch, 0.5, seed=0)
    noise = position_noise(0, batch["position"], (1, 8, 8), stream=1)
    t = module.time(Uniform(), batch)
    z = between(noise, changed["image"], t)
    out = module.student.network(z, (999 * t).float(), None, changed["augment"])
    expected = (out - (changed["image"] - noise)).square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(module.loss(module.prepare(batch)), expected)
    assert not torch.allclose(plain.straight(noise, batch["image"], Uniform(), batch)[0], out)
    with pytest.raises(ValueError, match="with teacher.network.augment_dim=9, got a .* with 0: "):
        rectified_flow(augment=0.5)


def test_reflow_takes_its_teachers_pairs(tmp_path):
    module = reflow(tmp_path)
    module.log = lambda *args, **kwargs: None
    noise = sample_noise(torch.arange(8), (2, 1, 1))
    ends = module.teacher.sample(noise)
    batch = {"noise": noise, "states": ends[:, None], "position": torch.arange(8)}
    t = module.time(Uniform(), batch)
    z = between(noise, ends, t)
    expected = (module.student.network(z, (999 * t).float()) - (ends - noise)).square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(module.loss(module.prepare(batch)), expected)


def test_any_denoiser_can_be_reflowed(tmp_path):
    """An EDM teacher: its pairs, its network and its highest level, 80, as the beginning of time."""
    module = reflow(tmp_path, exact_teacher(steps=10), kimg=1, times=Start())
    assert module.start == pytest.approx(1 / 81)
    fit(module, None)
    assert module.sample(latents(8)).isfinite().all()


def test_a_flow_is_sampled_by_its_teachers_solver_or_in_any_number_of_euler_steps(tmp_path):
    module = reflow(tmp_path)
    seen = []
    module.student.network.register_forward_hook(lambda _, args, out: seen.append(args[1][0].item()))
    assert module.nfe == 31
    torch.testing.assert_close(module.sample(latents(4)), module.teacher.sample(latents(4)))
    assert len(seen) == 31
    seen.clear()
    module.choose_steps(4, tmp_path)
    assert module.nfe == 4
    module.sample(latents(4))
    assert seen == pytest.approx([999 * t for t in (1e-3, 0.25075, 0.5005, 0.75025)], rel=1e-5)
    module.choose_steps(1, tmp_path)
    z = latents(4)
    v = velocity(module.student, z, torch.full((4,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(module.sample(z), z + (1 - 1e-3) * v)
    module.choose_steps(31, tmp_path)
    torch.testing.assert_close(module.sample(latents(4)), module.teacher.sample(latents(4)))


def test_times_depend_on_seed_and_position_alone(tmp_path):
    module = reflow(tmp_path)
    batch = {"position": torch.arange(100, 108)}
    whole = module.time(Uniform(), batch)
    torch.testing.assert_close(module.time(Uniform(), {"position": batch["position"][3:5]}), whole[3:5])
    assert not torch.equal(reflow(tmp_path, seed=1).time(Uniform(), batch), whole)


def test_label_dropout_is_off_where_pairs_have_labels(tmp_path):
    teacher = mixture_flow()
    teacher.denoiser.network.label_dropout = 0.1
    assert reflow(tmp_path, teacher).student.network.label_dropout == 0
    assert rectified_flow(teacher).student.network.label_dropout == 0.1
    assert teacher.denoiser.network.label_dropout == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"loss": "lpips"}, "method.loss"), ({"store": ""}, "method.store"), ({"pairs": 0}, "pairs")],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Reflow(
            mixture_flow(), **(COMMON | {"times": Uniform(), "name": "r", "pairs": 8, "held_out": 8} | options)
        ).training_data(None)

"""Consistency mid-training against its formula, and against a Gaussian, whose paths are known exactly."""

import math

import pytest
import torch
from torch import nn

from closed_forms import MEANS, CorrectedByLevel, Mixture, energy_distance, exact_teacher, fit, resumed_repeats
from lightning_modules import CMT
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, sample_noise

COMMON = {
    "name": "cmt",
    "batch_size": 8,
    "seed": 3,
    "kimg": 0.048,
    "lr": 1e-3,
    "optimizer": "radam",
    "dtype": "float32",
}
GAUSSIAN = Mixture(MEANS[:1])


def cmt(teacher, folder, **options):
    torch.manual_seed(0)  # of the networks' trainable parts
    return CMT(teacher, **(COMMON | {"pairs": 32, "held_out": 8, "store": folder} | options))


class Flow(nn.Module):
    """The path of N(mean, std^2) from each state to noise level `last`."""

    preconditioning = EDM()

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x, sigma, labels=None):
        mean, std = GAUSSIAN.means[0].view(2, 1, 1), GAUSSIAN.std
        shrunk = ((std**2 + self.last**2) / (std**2 + sigma.view(-1, 1, 1, 1).double() ** 2)).sqrt()
        return (mean + (x.double() - mean) * shrunk).float()


def exact_batch(levels):
    """Exact trajectories at `levels` from their unit noise, the first of which is no state of the store."""
    noise = sample_noise(torch.arange(5), (2, 1, 1))
    start = levels[0] * noise
    states = [Flow(level)(start, levels[:1]) for level in levels[1:].tolist()]
    return {"noise": noise, "states": torch.stack(states, 1)}


def test_the_exact_flow_map_has_no_loss(tmp_path):
    """From all states, the first one and those on the way; another map has."""
    module = cmt(exact_teacher(GAUSSIAN), tmp_path, loss="l1", steps=6)
    levels = torch.cat([module.levels, torch.tensor([0.001], dtype=torch.float64)])
    batch = exact_batch(levels)
    module.student = Flow(0.001)
    assert module.loss(batch) < 2e-4
    module.student = Flow(0.5)
    assert module.loss(batch) > 0.1


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_loss_is_a_mean_over_all_states(tmp_path, loss):
    """By hand, a state at a time; all are mapped to the end, and the end to nothing."""
    module = cmt(exact_teacher(network=CorrectedByLevel), tmp_path, loss=loss, steps=4)
    for parameter in module.student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    batch = {"noise": torch.randn(3, 2, 1, 1), "states": torch.randn(3, 4, 2, 1, 1)}
    end = batch["states"][:, -1]
    losses = []
    for i, level in enumerate(module.levels.float()):
        x = 80 * batch["noise"] if i == 0 else batch["states"][:, i - 1]
        square = (module.student(x, level) - end).square().flatten(1).sum(1)
        c = 0.00054 * 2
        losses.append(square / 2 if loss == "l2" else (square + c**2).sqrt() - c)
    torch.testing.assert_close(module.loss(batch), torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    assert module.evaluations == {"student": 4.0}
    assert module.levels.log().diff().tolist() == pytest.approx([-math.log(80 / 0.002) / 3] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_the_mixture(tmp_path, precision):
    real = Mixture().sample(1024, torch.Generator().manual_seed(1))
    teacher = exact_teacher(network=CorrectedByLevel)
    module = cmt(teacher, tmp_path, batch_size=32, kimg=16, lr=5e-3, pairs=1024, steps=8)
    noise = sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + 1024), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, None, precision=precision)
    assert energy_distance(module.sample(noise), real) < 0.4 * before


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    teacher = exact_teacher(network=CorrectedByLevel)

    def fresh():
        return cmt(teacher, tmp_path / "store", steps=3)

    resumed_repeats(fresh, None, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l3"}, "method.loss must be one of l2, l1, huber, lpips, lpips.l2, got 'l3'"),
        ({"middle": 80}, "method.middle must be a noise level between 0 and 80, or descending ones, got 80"),
        ({"steps": 0}, "method.steps must be an integer of at least 1, got 0"),
        ({"solver": "rk4"}, "method.solver='rk4' is unknown"),
        ({"store": ""}, "method.store must be a folder for the teacher's samples"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        cmt(exact_teacher(), tmp_path, **options)

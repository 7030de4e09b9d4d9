"""A teacher's self-test against a denoiser in closed form, and against everything that can be wrong with a config."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import X0, Preconditioning, V
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.self_test import self_test
from stillhouse.pictures.self_test import plot_self_test

CLASSES, SIDE, STD = 4, 6, 0.1


def centres() -> Tensor:
    """One smooth picture for each class, (CLASSES, 1, SIDE, SIDE), in [-0.6, 0.6]."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    return 0.6 * torch.stack([x, -x, y, -y])[:, None]


class Mixture(nn.Module):
    """The exact denoiser of Gaussians around the class pictures, as a network that predicts x0 of z = a x at the time 1000 u.

    Its own scale and offset of the images are wrong on demand.
    """

    resolution, in_channels, out_channels, num_classes = SIDE, 1, 1, CLASSES

    def __init__(self, scale: float = 1.0, offset: float = 0.0, shift: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scale, self.offset, self.shift = scale, offset, shift

    def forward(self, z: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma = torch.tan(times.double() * torch.pi / 2000)[:, None, None, None]
        x = z.double() * (1 + sigma**2).sqrt()
        means = self.scale * centres().double() + self.offset
        std = abs(self.scale) * STD
        if labels is None:
            distance = (x[:, None] - means).square().flatten(2).sum(2) / (std**2 + sigma.flatten(1) ** 2)
            weights = (-distance / 2).softmax(1)[:, :, None, None, None]
            mean = (weights * means).sum(1)
        else:
            mean = means[(labels + self.shift) % CLASSES]
        return ((std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)).float()


@dataclass
class Known:
    images: Tensor
    labels: Tensor


@pytest.fixture(scope="module")
def known():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % CLASSES
    return Known(centres()[labels] + STD * torch.randn(64, 1, SIDE, SIDE, generator=generator), labels)


def teacher(preconditioning: Preconditioning | None = None, sigma_max: float = 80.0, **wrong) -> Teacher:
    def schedule(steps):
        return karras(steps, 0.002, sigma_max)

    return Teacher("mixture", Mixture(**wrong), preconditioning or X0(), schedule, steps=10)


def failed(found) -> set[str]:
    return {check.name for check in found.failed}


def test_an_exact_denoiser_passes_and_its_errors_are_those_of_the_posterior(known):
    found = self_test(teacher(), (known.images, known.labels), range(64), "cpu")
    assert not found.failed
    assert found.real
    for level in found.levels:
        posterior = STD * level.sigma / (STD**2 + level.sigma**2) ** 0.5  # of a Gaussian of a known class
        assert level.error == pytest.approx(posterior, rel=0.05)
        assert level.eps == pytest.approx(level.error / level.sigma)
        a = (1 + level.sigma**2) ** -0.5
        assert level.v == pytest.approx(level.error / (level.sigma * a))  # v = (a z - x0) / s with z = a x, s = a sigma
        t = 1 / (1 + level.sigma)
        assert level.velocity == pytest.approx(level.error / (1 - t))
    assert min(found.scores, key=found.scores.get) == "X0"
    assert found.samples.shape == found.images.shape


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"scale": 0.5, "offset": 0.5}, {"denoises known images", "values"}),  # it learned images in [0, 1]
        ({"shift": 1}, {"denoises known images", "labels"}),
        ({"sigma_max": 1.0}, {"noise levels"}),
    ],
)
def test_what_is_wrong_is_named(known, wrong, expected):
    found = self_test(teacher(**wrong), (known.images, known.labels), range(64), "cpu")
    assert failed(found) == expected


def test_another_parameterisation_is_found_out(known):
    found = self_test(teacher(V()), (known.images, known.labels), range(64), "cpu")
    assert {"parameterisation", "denoises known images"} <= failed(found)
    assert found.scores["X0"] < 0.9 < found.scores["V"]


def test_shuffled_labels_are_no_help(known):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    found = self_test(teacher(), (known.images, known.labels[order]), range(64), "cpu")
    assert "labels" in failed(found)


def test_diverging_samples_are_found(known):
    broken = teacher()
    broken.denoiser = Denoiser(_Diverging(), X0())
    found = self_test(broken, (known.images, known.labels), range(8), "cpu")
    assert {"samples are finite", "denoises known images"} <= failed(found)


class _Diverging(Mixture):
    def forward(self, z, times, labels=None):
        return super().forward(z, times, labels) / 0


def test_without_real_images_the_teachers_own_samples_serve(tmp_path):
    found = self_test(teacher(), None, range(64), "cpu")
    assert not found.real
    assert torch.equal(found.images, found.samples)
    assert {check.name for check in found.checks if check.passed is None} == {"labels", "values"}
    assert not found.failed
    figure = plot_self_test(tmp_path / "check.png", found, "mixture")
    assert (tmp_path / "check.png").stat().st_size > 5000
    assert "all checks passed" in figure.get_suptitle()

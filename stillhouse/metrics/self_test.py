"""The self-test of a teacher: it denoises known images and samples new ones, before days are spent on it.

A wrong range of noise levels, distribution of labels, range of values or parameterisation shows in a minute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.preconditioning import EDM, VE, VP, X0, Epsilon, Preconditioning, V, Velocity
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.diffusion.teacher import Teacher

PARAMETERISATIONS: tuple[type[Preconditioning], ...] = (EDM, VP, VE, Epsilon, V, X0, Velocity)
SOLVER_STEPS = 18  # at most, of the samples
LEVELS = 9  # noise levels from the schedule's lowest to its highest
_FEW = 16  # images that other parameterisations are tried on
_SLACK = 1.1  # times the linear denoiser's error
_GOOD = 0.9  # times it
_MAX_IMAGE_STD = 0.1  # standard deviations of the images over the highest noise level
_WIDTHS = 1.5  # ratio of the samples' to the images' standard deviation
_SHIFT = 0.3  # of the samples' mean, in standard deviations of the images
_MIN_DEVIATIONS = 2  # standard errors by which true labels must be better than wrong ones
_OUTSIDE = 0.05  # share of the samples' values beyond [-1.1, 1.1]


@dataclass(frozen=True)
class Level:
    """Root mean square errors at one noise level: of the denoiser, and of the best linear one for each pixel alone.

    eps, v, velocity: the same error as one of the noise e, of v = a e - s x0 and of a flow's velocity x0 - e.
    """

    sigma: float
    error: float
    linear: float

    @property
    def eps(self) -> float:
        return self.error / self.sigma

    @property
    def v(self) -> float:
        return self.error * (1 + self.sigma**-2) ** 0.5

    @property
    def velocity(self) -> float:
        return self.error * (1 + 1 / self.sigma)


@dataclass(frozen=True)
class Check:
    """One check of the self-test; `passed` is None where it could not be made."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test.

    Attributes:
        real: whether the known images are real ones; else they are the teacher's own samples.
        levels: errors at each noise level.
        scores: {name of a preconditioning: error over the linear denoiser's, a geometric mean over the levels}.
        checks: in order.
        images: the known images.
        samples: of the teacher.
    """

    real: bool
    levels: list[Level]
    scores: dict[str, float]
    checks: list[Check]
    images: Tensor
    samples: Tensor

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if check.passed is False]


@torch.no_grad()
def self_test(
    teacher: Teacher, known: tuple[Tensor, Tensor | None] | None, seeds: Sequence[int], device: torch.device | str
) -> SelfTest:
    """Test a teacher.

    Args:
        teacher: it is moved to `device`.
        known: real images (N, C, H, W) in [-1, 1] with labels (N,) or None; None: the teacher's own samples are taken.
        seeds: of the samples.
        device: to compute on.
    """
    teacher.to(device)
    places = torch.tensor(list(seeds), device=device)
    noise = sample_noise(places, (teacher.channels, teacher.resolution, teacher.resolution))
    sample_classes = sample_labels(places, teacher.num_classes)
    samples = teacher.sample(noise, sample_classes, min(teacher.steps, SOLVER_STEPS))
    real = known is not None
    images, labels = known if real else (samples, sample_classes)
    images = images.to(device)
    labels = labels.to(device) if labels is not None and teacher.num_classes else None
    schedule = teacher.sigmas()
    sigmas = torch.logspace(*schedule[[-2, 0]].log10().tolist(), LEVELS, dtype=torch.float64).tolist()
    configured = type(teacher.denoiser.preconditioning).__name__
    linear = [_linear_error(images, sigma) for sigma in sigmas]
    errors = [_error(teacher.unguided, images, sigma, labels) for sigma in sigmas]
    levels = [Level(*row) for row in zip(sigmas, errors, linear, strict=True)]
    scores = {configured: _score(levels)}
    for kind in PARAMETERISATIONS:
        if kind.__name__ != configured:
            other = Denoiser(teacher.denoiser.network, kind().to(device))
            tried = [_error(other, images[:_FEW], sigma, None if labels is None else labels[:_FEW]) for sigma in sigmas]
            scores[kind.__name__] = _score([Level(*row) for row in zip(sigmas, tried, linear, strict=True)])
    checks = [
        _check_denoising(levels),
        _check_parameterisation(scores, configured),
        _check_noise_range(images, schedule[0].item()),
        _check_labels(teacher, images, labels, sigmas) if real else _skipped("labels"),
        _check_finite(samples),
        _check_range(samples),
        _check_values(samples, images) if real else _skipped("values"),
    ]
    return SelfTest(real, levels, scores, checks, images, samples)


def _errors(denoiser: Denoiser, images: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """Mean squares over each image's values, (N,), float64."""
    noise = sample_noise(torch.arange(len(images), device=images.device), images.shape[1:])
    level = images.new_full((len(images),), sigma)
    estimate = denoiser(noised(images, level, noise), level, labels)
    return (estimate - images).double().square().flatten(1).mean(1)


def _error(denoiser: Denoiser, images: Tensor, sigma: float, labels: Tensor | None) -> float:
    return _errors(denoiser, images, sigma, labels).mean().sqrt().item()


def _linear_error(images: Tensor, sigma: float) -> float:
    """The error of the best linear denoiser of each pixel alone (Wiener's); a network should beat it, as pixels correlate."""
    variance = images.double().var(0)
    return (variance * sigma**2 / (variance + sigma**2)).mean().sqrt().item()


def _score(levels: Sequence[Level]) -> float:
    ratios = torch.tensor([level.error / level.linear for level in levels], dtype=torch.float64)
    return ratios.log().mean().exp().item()


def _check_denoising(levels: list[Level]) -> Check:
    worst = max(levels, key=lambda level: level.error / level.linear)
    best = min(level.error / level.linear for level in levels)
    highest = worst.error / worst.linear
    text = f"at most {highest:.2f} times the linear denoiser's error (at sigma={worst.sigma:.3g}), at best {best:.2f}"
    # An untrained network is close to the linear one at both ends.
    return Check("denoises known images", highest <= _SLACK and best < _GOOD, text)


def _check_parameterisation(scores: dict[str, float], configured: str) -> Check:
    best = min(scores, key=lambda name: scores[name])
    text = f"errors over the linear denoiser's: {', '.join(f'{name} {value:.3g}' for name, value in scores.items())}"
    # Where no parameterisation is good, something else is wrong.
    return Check("parameterisation", scores[best] > _GOOD or scores[configured] <= _SLACK * scores[best], text)


def _check_noise_range(images: Tensor, highest: float) -> Check:
    left = images.double().std(0).square().mean().sqrt().item() / highest
    text = f"the images' standard deviation is {left:.3g} of the highest noise level, {highest:.4g}"
    return Check("noise levels", left < _MAX_IMAGE_STD, text)


def _check_labels(teacher: Teacher, images: Tensor, labels: Tensor | None, sigmas: Sequence[float]) -> Check:
    """True labels must lead to smaller errors than the next class, image by image, at the levels where classes matter."""
    if labels is None:
        return Check("labels", None, "there are none")
    spread = images.double().std().item()
    chosen = [sigma for sigma in sigmas if spread <= sigma <= 20 * spread] or [spread]
    wrong = (labels + 1) % teacher.num_classes
    true_errors, wrong_errors = (
        torch.stack([_errors(teacher.unguided, images, sigma, given) for sigma in chosen]).mean(0)
        for given in (labels, wrong)
    )
    gains = wrong_errors - true_errors
    deviations = (gains.mean() / (gains.std() / len(gains) ** 0.5).clamp_min(1e-12)).item()
    ratio = (true_errors.mean() / wrong_errors.mean()).sqrt().item()
    text = f"errors with the true labels are {ratio:.3f} of those with wrong ones, {deviations:.1f} standard errors"
    return Check("labels", deviations > _MIN_DEVIATIONS, text)


def _check_finite(samples: Tensor) -> Check:
    count = int(samples.isfinite().flatten(1).all(1).sum())
    return Check("samples are finite", count == len(samples), f"{count} of {len(samples)}")


def _check_range(samples: Tensor) -> Check:
    share = (samples.abs() > 1.1).double().mean().item()
    return Check("samples lie in [-1, 1]", share < _OUTSIDE, f"{100 * share:.2f} % of the values lie beyond 1.1")


def _check_values(samples: Tensor, images: Tensor) -> Check:
    widths = (samples.double().std() / images.double().std()).item()
    shift = ((samples.double().mean() - images.double().mean()) / images.double().std()).item()
    passed = 1 / _WIDTHS < widths < _WIDTHS and abs(shift) < _SHIFT
    return Check(
        "values",
        passed,
        f"samples have {widths:.2f} times the images' standard deviation, means differ by {shift:+.2f} of it",
    )


def _skipped(name: str) -> Check:
    return Check(name, None, "needs real images")

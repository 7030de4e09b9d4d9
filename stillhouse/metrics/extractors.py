"""Feature extractors: the spaces in which sets of images are compared."""

from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from stillhouse.checkpoints.weights import did_you_mean, hash_state, load_weights
from stillhouse.metrics import digits_classifier, fashion_classifier
from stillhouse.metrics.digits_classifier import DigitsClassifier
from stillhouse.metrics.fashion_classifier import FashionClassifier
from stillhouse.metrics.fidelity import NO_WEIGHTS_ADVICE, Inception, TorchFidelity
from stillhouse.metrics.images import from_uint8
from stillhouse.metrics.small_classifier import SmallClassifier

__all__ = ["Digits", "Fashion", "FeatureExtractor", "Inception", "Pixels", "Points", "TorchFidelity"]


class FeatureExtractor(Protocol):
    """What metrics need of an extractor.

    `metric_suffix` is appended to every metric's printed name: only Inception features, whose suffix is empty, may be called FID.
    One without learned features has `frechet_name`, which is printed in the place of fid. `hash` is a SHA-256 of the weights. An
    extractor is deliberately no nn.Module: as an attribute of a LightningModule it stays out of checkpoints, averages and
    parameter counts. One that is fast at the cost of exactness has `exact`, the extractor that it stands for, and keeps the
    `shift` that it makes (see `stillhouse.metrics.evaluation.measure_sampler`).
    """

    name: str
    metric_suffix: str
    dim: int
    hash: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, dim), float32, of uint8 images (N, C, H, W); no gradient, autocast off whatever surrounds it."""

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits (N, K) of the extractor's own classes, float32, for the inception score."""

    def to(self, device: torch.device | str) -> "FeatureExtractor": ...


class _Classifier:
    """The penultimate layer of a small classifier of grey images (N, 1, side, side).

    Raises FileNotFoundError for missing weights and OSError for damaged ones.
    """

    name: str

    def __init__(self, classifier: SmallClassifier, side: int, dim: int, weights: str | Path, program: str):
        self._classifier = classifier.eval().requires_grad_(False)
        self._side, self.dim = side, dim
        try:
            load_weights(weights, self._classifier)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no classifier of {self.name} at {weights}{did_you_mean(weights)}; make it: "
                f"python -m {program} --output {weights}"
            ) from error
        self.hash = hash_state(self._classifier)

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (1, self._side, self._side):
            raise ValueError(
                f"the {self.name} extractor reads uint8 images (N, 1, {self._side}, {self._side}), got {images.dtype} "
                f"{tuple(images.shape)}; choose an extractor that fits the data (evaluation=...): {NO_WEIGHTS_ADVICE}"
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._classifier.features(images)

    def class_logits(self, features: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return self._classifier.head(features.float())

    def to(self, device: torch.device | str) -> "_Classifier":
        self._classifier.to(device)
        return self


class Digits(_Classifier):
    """The 64 features of the digit classifier, of images (N, 1, 8, 8); its metrics end in `_digits`."""

    name = "digits"
    metric_suffix = "_digits"

    def __init__(self, weights: str | Path = digits_classifier.WEIGHTS):
        super().__init__(
            DigitsClassifier(), 8, digits_classifier.FEATURES, weights, "stillhouse.metrics.digits_classifier"
        )


class Fashion(_Classifier):
    """The 64 features of a classifier of clothes, of images (N, 1, resolution, resolution); its metrics end in `_fashion`.

    Args:
        resolution: 16 or 32; each has a classifier of its own, whose features do not compare with the other's.
        weights: None: those in pretrained/.

    Raises:
        ValueError: For another resolution.
    """

    name = "fashion"
    metric_suffix = "_fashion"

    def __init__(self, resolution: int, weights: str | Path | None = None):
        if resolution not in fashion_classifier.RESOLUTIONS:
            raise ValueError(
                f"data.resolution={resolution}: evaluation=fashion has classifiers for "
                f"{' and '.join(map(str, fashion_classifier.RESOLUTIONS))} pixels a side alone; choose one of these, or: "
                f"{NO_WEIGHTS_ADVICE}"
            )
        program = f"stillhouse.metrics.fashion_classifier --data data/fashion_mnist{resolution}"
        weights = weights or fashion_classifier.weights_file(resolution)
        super().__init__(FashionClassifier(resolution), resolution, fashion_classifier.FEATURES, weights, program)


class Pixels:
    """Pooled pixels and gradients of images (N, 1 or 3, H, W), 224 features without any weights; metrics end in `_pixels`.

    Colours in [-1, 1], averaged over 8 x 8 fields (192 features, grey counted as three equal colours), and the mean sizes of
    brightness steps to the right and down, over 4 x 4 fields each (32). That sees layout, colour, contrast and blur, but nothing
    of what a picture shows, so its Frechet distance is called fd_pixels and not FID: it compares runs on the same images.
    """

    name = "pixels"
    metric_suffix = "_pixels"
    frechet_name = "fd"
    dim = 224
    hash = sha256(b"p / 127.5 - 1: means of 8 x 8 fields, mean absolute differences of the grey in 4 x 4").hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] not in (1, 3)
            or min(images.shape[2:]) < 2
        ):
            raise ValueError(
                f"the pixels extractor reads uint8 images (N, 1 or 3, H, W) of 2 pixels a side or more, got {images.dtype} "
                f"{tuple(images.shape)}; choose an extractor that fits the data (evaluation=...)"
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            colours = from_uint8(images)
            grey = colours.mean(1, keepdim=True)
            steps = (grey.diff(dim=3).abs(), grey.diff(dim=2).abs())
            fields = [
                adaptive_avg_pool2d(colours.expand(-1, 3, -1, -1), 8),
                *(adaptive_avg_pool2d(s, 4) for s in steps),
            ]
            return torch.cat([field.flatten(1) for field in fields], dim=1)

    def class_logits(self, features: Tensor) -> Tensor:
        raise ValueError("pixels have no classes: leave `is` out of the metrics")

    def to(self, device: torch.device | str) -> "Pixels":
        return self


class Points:
    """The coordinates, in [-1, 1], of points of the plane that are stored as images (N, 2, 1, 1); metrics end in `_points`.

    It has no weights, so its hash is that of the formula, and no classes: an inception score is refused.
    """

    name = "points"
    metric_suffix = "_points"
    dim = 2
    hash = sha256(b"p / 127.5 - 1").hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (2, 1, 1):
            raise ValueError(
                f"the points extractor reads uint8 images (N, 2, 1, 1), got {images.dtype} {tuple(images.shape)}; "
                "choose an extractor that fits the data (evaluation=...)"
            )
        return from_uint8(images.flatten(1))

    def class_logits(self, features: Tensor) -> Tensor:
        raise ValueError("points of the plane have no classes: leave `is` out of the metrics")

    def to(self, device: torch.device | str) -> "Points":
        return self

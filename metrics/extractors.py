"""Feature extractors: the space in which sets of images are compared."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from metrics.digits_classifier import FEATURES, WEIGHTS, DigitsClassifier
from metrics.images import from_uint8
from networks.weights import find_weights, hash_file, hash_state, load_weights

_HUB_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth")  # torch hub's files: the beginning of their SHA-256 is in the name
_AT_ONCE = 128  # images of 299x299 in Inception, which take some 20 MB each


class FeatureExtractor(Protocol):
    """What metrics need of an extractor.

    `metric_suffix` is appended to every metric's printed name: only Inception features, whose suffix is empty, may be
    called FID. `hash` is a SHA-256 of the weights. An extractor is deliberately no nn.Module: as an attribute of a
    LightningModule it stays out of checkpoints, averages and parameter counts.
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


class Digits:
    """The penultimate layer of the digit classifier, 64 features, for images (N, 1, 8, 8); its metrics end in `_digits`.

    Raises FileNotFoundError for missing weights and OSError for damaged ones.
    """

    name = "digits"
    metric_suffix = "_digits"
    dim = FEATURES

    def __init__(self, weights: str | Path = WEIGHTS):
        self._classifier = DigitsClassifier().eval().requires_grad_(False)
        try:
            load_weights(weights, self._classifier)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no digit classifier at {weights}; make it with `python -m metrics.digits_classifier --output {weights}`"
            ) from error
        self.hash = hash_state(self._classifier)

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (1, 8, 8):
            raise ValueError(
                f"the digits extractor reads uint8 images (N, 1, 8, 8), got {images.dtype} {tuple(images.shape)}; "
                "choose an extractor that fits the data"
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._classifier.features(images)

    def class_logits(self, features: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return self._classifier.head(features.float())

    def to(self, device: torch.device | str) -> "Digits":
        self._classifier.to(device)
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


class Inception:
    """The pooled layer of Inception-v3, 2048 features, for RGB images (N, 3, H, W); its metrics are FID, KID and IS.

    The network, its weights (converted from TensorFlow's of 2015-12-05) and its way of resizing are torch-fidelity's
    "inception-v3-compat". `weights`: their file, of which a copy in torch hub's folder, where torch-fidelity itself keeps it,
    does as well; None: that one. `url`: where it is to be had, for the message alone.

    Raises ImportError without torch-fidelity, FileNotFoundError for missing weights, OSError for damaged ones and
    ValueError for those of another network.
    """

    name = "inception"
    metric_suffix = ""
    dim = 2048

    def __init__(self, weights: str | Path | None = None, url: str | None = None):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as source  # takes seconds
        except ImportError as error:
            raise ImportError(
                f"the inception extractor needs torch-fidelity ({error}): pip install torch-fidelity"
            ) from error
        path = find_hub_file(weights or Path(source.URL_INCEPTION_V3).name)
        if path is None:
            raise FileNotFoundError(
                f"no Inception weights at {weights or hub_folder() / Path(source.URL_INCEPTION_V3).name}; "
                f"add download=true to fetch {url or source.URL_INCEPTION_V3}, or put the file there"
            )
        check_hub_name(path)
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle says
        except Exception as error:  # of many kinds
            raise OSError(f"{path} is damaged or no file of weights; delete it and fetch it again") from error
        try:
            self._network = source.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} holds weights of another network; fetch {source.URL_INCEPTION_V3}") from error
        self.hash = hash_state(self._network)

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"the inception extractor reads uint8 RGB images (N, 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}; choose an extractor that fits the data (evaluation=...)"
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._network(part)[0] for part in images.split(_AT_ONCE)])

    def class_logits(self, features: Tensor) -> Tensor:
        # Without the bias, as the inception score was defined on TensorFlow's graph.
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return features.float() @ self._network.fc.weight.T

    def to(self, device: torch.device | str) -> "Inception":
        self._network.to(device)
        return self


def hub_folder() -> Path:
    """Where torch hub, and with it torch-fidelity, keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_hub_file(path: str | Path) -> Path | None:
    """The file at `path` (as `find_weights`), or else the one of its name in torch hub's folder; None where neither is there."""
    try:
        return find_weights(path)
    except FileNotFoundError:
        kept = hub_folder() / Path(path).name
        return kept if kept.is_file() else None


def check_hub_name(path: Path) -> None:
    """Errors: OSError for a file of torch hub's with another hash than its name says."""
    named = _HUB_NAME.search(path.name)
    if named and not (found := hash_file(path)).startswith(named[1]):
        raise OSError(
            f"{path} has SHA-256 {found[:8]}..., its name says {named[1]}: damaged or another file; delete it and fetch it again"
        )

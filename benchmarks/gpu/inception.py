"""Inception-v3 with random weights, for its speed: torch-fidelity's where that is installed, else torchvision's."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_inception import write_inception
from stillhouse.metrics.extractors import FeatureExtractor, Inception

_SIDE, _CHUNK = 299, 128


class TorchvisionInception:
    """torchvision's Inception-v3, whose convolutions are those of FID's network: the same arithmetic, other pooling in places.

    precision: "32", or "bf16" inside of the network.
    """

    name, metric_suffix, dim, hash = "torchvision's Inception-v3, random", "_random", 2048, ""

    def __init__(self, precision: str):
        from torchvision.models import inception_v3

        self._network = inception_v3(weights=None, aux_logits=False, init_weights=False).eval().requires_grad_(False)
        self._network.fc = torch.nn.Identity()
        self._fast = precision == "bf16"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._fast):
            return torch.cat([self._features(part) for part in images.split(_CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        enlarged = F.interpolate(images.float(), (_SIDE, _SIDE), mode="bilinear", align_corners=False)
        return self._network(enlarged / 127.5 - 1).float()

    def to(self, device: torch.device | str) -> "TorchvisionInception":
        self._network.to(device)
        return self


def random_inception(precision: str = "32") -> tuple[FeatureExtractor, str]:
    """An extractor of the features of RGB images, and whose network it is; precision: as of the extractors."""
    try:
        with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
            return Inception(write_inception(Path(folder) / "inception.pth"), precision=precision), "torch-fidelity"
    except ImportError:
        return TorchvisionInception(precision), "torchvision"

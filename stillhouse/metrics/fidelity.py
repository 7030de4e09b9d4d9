"""The networks of torch-fidelity as feature extractors, with weights from files alone."""

import copy
import re
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.checkpoints.bounds import check_archive, check_tensors
from stillhouse.checkpoints.weights import did_you_mean, find_weights, hash_file, hash_state
from stillhouse.metrics.dinov2 import DINOv2

# Advice in errors, for data sets that no extractor's weights fit.
NO_WEIGHTS_ADVICE = (
    "evaluation=pixels needs no weights (fd_pixels, which is no FID), evaluation=none trains without a measurement"
)
PRECISIONS = ("32", "bf16")
INCEPTION = "inception-v3-compat"
_LAYERS = {"inception": "2048", "vgg16": "fc2_relu", "clip": "clip", "dinov2": "dinov2"}  # by family
_HUB_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth?$")  # torch hub's files: the beginning of their SHA-256 is in the name
_CHUNK = 128  # images of 299x299 in Inception, which take some 20 MB each


class TorchFidelity:
    """A network of torch-fidelity as a feature extractor for images (N, 1 or 3, H, W), which it resizes in its own way.

    Grey counts as three equal colours.

    Metrics end in _clip, _dinov2 or _vgg16. With `precision` or `compile` it is another extractor, with another name and hash,
    whose `exact` is the one in float32.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        url: str | None = None,
        precision: str = "32",
        compile: bool = False,
    ):
        """Load the network.

        Args:
            name: torch-fidelity's: clip-vit-b-32 and others of CLIP, dinov2-vit-s-14 to -g-14, vgg16.
            weights: their file; where it is missing, the file of that name in torch hub's folder, where torch-fidelity keeps
                it, is taken. None: that one.
            url: where it can be had, for the message alone.
            precision: "32", or "bf16" inside of the network.
            compile: whether torch compiles the network.

        Raises:
            ImportError: without torch-fidelity.
            FileNotFoundError: for missing weights.
            OSError: for damaged weights.
            ValueError: for weights of another network, or unknown options.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"evaluation.extractor.precision must be 32 or bf16, got {precision!r}")
        try:
            from torch_fidelity import registry  # takes seconds
        except ImportError as error:
            raise ImportError(
                f"the extractor {name} needs torch-fidelity ({error}): pip install torch-fidelity"
            ) from error
        known = registry.FEATURE_EXTRACTORS_REGISTRY
        if name not in known:
            raise ValueError(
                f"evaluation.extractor.name={name} is none of torch-fidelity's: {', '.join(sorted(known))}"
            )
        family = name.partition("-")[0]
        usual, published = _published(name)
        path = find_hub_file(weights or usual)
        if path is None:
            place = f"{weights}{did_you_mean(weights)}" if weights else hub_folder() / usual
            raise FileNotFoundError(
                f"no {name} weights at {place}; add download=true to fetch {url or published}, "
                f"or put the file there; {NO_WEIGHTS_ADVICE}"
            )
        check_hub_name(path)
        self._network = _network(name, known[name], path, published)
        self.name, self.metric_suffix = name, f"_{family}"
        self.hash = hash_state(self._network)
        self.exact: TorchFidelity | None = None
        self.shift: float | None = None
        self._precision, self._whole_batches = precision, False
        self._run: Callable[[Tensor], tuple[Tensor, ...]] = self._network
        if precision != "32" or compile:
            self.exact = copy.copy(self)
            self.exact._precision = "32"
            ways = [precision] * (precision != "32") + ["compiled"] * compile
            self.name = "-".join([name, *ways])
            self.hash = sha256(" ".join([self.hash, *ways]).encode()).hexdigest()
        if compile:
            self._whole_batches = True
            self._run = torch.compile(self._network)

    @cached_property
    def dim(self) -> int:
        device = next(self._network.parameters()).device
        with torch.no_grad():
            return self._network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device))[0].shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"the {self.name} extractor reads uint8 images (N, 1 or 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}; choose an extractor that fits the data (evaluation=...)"
            )
        fast = self._precision == "bf16"
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=fast):
            return torch.cat([self._features(part) for part in images.split(_CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        count = len(images)
        if images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        if self._whole_batches and count < _CHUNK:  # another size would be compiled anew
            images = torch.cat([images, images.new_zeros(_CHUNK - count, *images.shape[1:])])
        return self._run(images)[0][:count].float()

    def class_logits(self, features: Tensor) -> Tensor:
        raise ValueError(f"the {self.name} extractor has no classes: leave `is` out of the metrics")

    def to(self, device: torch.device | str) -> "TorchFidelity":
        self._network.to(device)
        return self


class Inception(TorchFidelity):
    """The pooled layer of Inception-v3, 2048 features, whose metrics are FID, KID and IS. Options are as in `TorchFidelity`.

    The weights were converted from TensorFlow's of 2015-12-05; with its resizing this is torch-fidelity's "inception-v3-compat".
    """

    dim = 2048

    def __init__(
        self,
        weights: str | Path | None = None,
        url: str | None = None,
        precision: str = "32",
        compile: bool = False,
    ):
        super().__init__(INCEPTION, weights, url, precision, compile)
        for extractor in (self, self.exact):
            if extractor is not None:
                extractor.name = extractor.name.replace(INCEPTION, "inception")
                extractor.metric_suffix = ""

    def class_logits(self, features: Tensor) -> Tensor:
        # Without the bias, as the inception score was defined on TensorFlow's graph.
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return features.float() @ self._network.fc.weight.T


def _published(name: str) -> tuple[str, str]:
    """The file name of a network's weights in torch hub's folder, and their address."""
    if name.startswith("clip"):
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

        return f"{name}-{MODEL_METADATA[name]['hash']}.pt", MODEL_URLS[name]
    if name.startswith("dinov2"):
        from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

        model = MODEL_METADATA[name]
        return f"{model}_pretrain.pth", f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth"
    if name == INCEPTION:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    else:
        from stillhouse.checkpoints.lpips import URL as url
    return Path(url).name, url


def _network(name: str, extractor: type[nn.Module], path: Path, published: str) -> nn.Module:
    """torch-fidelity's network with the weights of a file; no code in that file is run."""
    family = name.partition("-")[0]
    try:
        # CLIP's is TorchScript; of the others torch-fidelity would run what a pickle says.
        read = torch.jit.load(path, map_location="cpu") if family == "clip" else _state(path)
    except Exception as error:  # of many kinds
        raise OSError(f"{path} is damaged or no file of weights; delete it and fetch it again") from error
    try:
        if family == "dinov2":
            return _dinov2(name, extractor, read)
        return extractor(name, [_LAYERS[family]], feature_extractor_weights_path=str(path)).eval()
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} holds weights of another network; fetch {published}") from error


def _state(path: Path) -> dict[str, Tensor]:
    check_archive(path)
    return check_tensors(torch.load(path, map_location="cpu", weights_only=True), path)


def _dinov2(name: str, extractor: type[nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's DINOv2, without its constructor, which would run the code of a repository that torch hub downloads."""
    width = {"s": 384, "b": 768, "l": 1024, "g": 1536}[name.split("-")[2]]
    model = DINOv2(state)
    if model.norm.weight.shape != (width,):
        raise ValueError(f"{name} has a width of {width}")
    built = extractor.__new__(extractor)
    super(extractor, built).__init__(name, [_LAYERS["dinov2"]])
    built.feature_extractor_internal_dtype, built.model = torch.float32, model
    return built.requires_grad_(False).eval()


def hub_folder() -> Path:
    """The folder in which torch hub, and with it torch-fidelity, keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_hub_file(path: str | Path) -> Path | None:
    """The file at `path` (see `find_weights`), or the one of its name in torch hub's folder; None without either."""
    try:
        return find_weights(path)
    except FileNotFoundError:
        kept = hub_folder() / Path(path).name
        return kept if kept.is_file() else None


def check_hub_name(path: Path) -> None:
    """Compare a file with the beginning of its SHA-256 that torch hub puts into its name.

    Raises:
        OSError: where they differ.
    """
    named = _HUB_NAME.search(path.name)
    if named and not (found := hash_file(path)).startswith(named[1]):
        raise OSError(
            f"{path} has SHA-256 {found[:8]}..., its name says {named[1][:8]}: damaged or another file; "
            "delete it and fetch it again"
        )

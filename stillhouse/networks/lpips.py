"""LPIPS: how different two images look to a network that has learned to name things (Zhang et al., arXiv 1801.03924)."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stillhouse.checkpoints.bounds import check_archive
from stillhouse.checkpoints.weights import find_weights
from stillhouse.checks import check_counts

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's, 528 MB
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG-16's convolutions
_SMALLEST = 32  # as torchvision says of VGG-16; LPIPS' deepest features then have 2x2 pixels


class LPIPS(nn.Module):
    """A frozen VGG-16 and the released linear heads (version 0.1), which weigh its channels by what people see.

        d(a, b) = sum over 5 levels of the mean over pixels of  w . (f(a) - f(b))^2

    with f the features before each pooling and after the last convolution, scaled to unit length at each pixel. The heads
    come with torchmetrics, whose values these are; the network is torchvision's, whose file nothing here downloads.

    weights: that file; None: where torchvision would keep it, in torch hub's folder. resize: smaller images are enlarged
    to resize x resize pixels first, bilinearly (2-RF++'s released code: 224; rectified flow's: None).

    Raises FileNotFoundError for missing weights, OSError for damaged ones, ValueError for those of another network or an
    impossible `resize`.
    """

    def __init__(self, weights: str | Path | None = None, resize: int | None = None):
        super().__init__()
        if resize is not None:
            check_counts(_SMALLEST, **{"method.lpips_resize": resize})
        self.resize = resize
        self.features = _read_vgg16(weights)
        self.heads = nn.ParameterList(_read_heads())
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet in [0, 1]
        self.register_buffer("shift", (2 * mean - 1).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", (2 * std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,), float32 whatever autocast says, of images (B, 3, H, W) in [-1, 1]; differentiable in both.

        ValueError where images are not RGB or smaller than 32x32.
        """
        check_lpips_shape(a.shape[1:])
        distance = a.new_zeros(len(a), dtype=torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            for head, x, y in zip(self.heads, self.levels(a), self.levels(b), strict=True):
                distance = distance + (head * (x - y).square()).sum(1).mean((1, 2))
        return distance

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """The five levels' features, unit vectors along dimension 1: (B, 64, H, W) to (B, 512, H // 16, W // 16)."""
        x = images.float()
        if self.resize is not None and min(x.shape[2:]) < self.resize:
            x = interpolate(x, (self.resize, self.resize), mode="bilinear")
        x = (x - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield _unit(x)
            x = layer(x)
        yield _unit(x)


def check_lpips_shape(shape: Sequence[int]) -> None:
    """ValueError for images (C, H, W) that VGG-16 doesn't take."""
    if len(shape) != 3 or shape[0] != 3 or min(shape[1:]) < _SMALLEST:
        raise ValueError(
            f"LPIPS is for RGB images of at least {_SMALLEST}x{_SMALLEST}, this data has {'x'.join(map(str, shape))}; "
            "choose another method.loss"
        )


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()  # where all features are zero, so is the gradient


def vgg16_file(weights: str | Path | None) -> Path:
    """Where VGG-16's weights are kept: `weights`, or as torchvision does in torch hub's folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name if weights is None else Path(weights)


def _read_vgg16(weights: str | Path | None) -> nn.Sequential:
    path = vgg16_file(weights)
    try:
        path = find_weights(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no VGG-16 weights at {path}; add download=true to fetch {URL}, or say where that file is by method.lpips_weights"
        ) from error
    try:
        # The published file is older than the zip format of torch.save, and only that can be mapped.
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many kinds
        raise OSError(f"{path} is damaged or no file of weights; delete it and fetch it again") from error
    with torch.device("meta"):  # leaves the random state alone
        features = _vgg16()
    given = {}
    if isinstance(state, Mapping):  # with the classifier, which is ignored
        given = {str(name)[9:]: value for name, value in state.items() if str(name).startswith("features.")}
    shapes = {name: getattr(value, "shape", None) for name, value in given.items()}
    if shapes != {name: value.shape for name, value in features.state_dict().items()}:
        raise ValueError(f"{path} holds weights of another network; fetch {URL}")
    features.to_empty(device="cpu").load_state_dict(given)
    return features


def _vgg16() -> nn.Sequential:
    """VGG-16's layers up to its last convolution, with torchvision's numbers as their names."""
    layers, before = [], 3
    for stage in _STAGES:
        for channels in stage:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def _read_heads() -> list[Tensor]:
    import torchmetrics  # takes a second

    path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{level}.model.1.weight"] for level in range(len(_STAGES))]  # (1, channels, 1, 1)

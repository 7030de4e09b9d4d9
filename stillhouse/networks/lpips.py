"""LPIPS: how different two images look to a network that has learned to name things (Zhang et al., arXiv 1801.03924)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stillhouse.checks import check_counts

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG-16's convolutions
_SMALLEST = 32  # as torchvision says of VGG-16; LPIPS' deepest features then have 2x2 pixels


class LPIPS(nn.Module):
    """A frozen VGG-16 and the released linear heads (version 0.1), which weigh its channels by what people see.

        d(a, b) = sum over 5 levels of the mean over pixels of  w . (f(a) - f(b))^2

    with f the features before each pooling and after the last convolution, scaled to unit length at each pixel. Weights come
    from `stillhouse.checkpoints.lpips.load_lpips`.

    Args:
        features: `vgg16`.
        heads: w of each level, (1, channels, 1, 1).
        resize: smaller images are enlarged to resize x resize pixels first, bilinearly (2-RF++'s released code: 224;
            rectified flow's: None).

    Raises:
        ValueError: for an impossible `resize`.
    """

    def __init__(self, features: nn.Sequential, heads: Sequence[Tensor], resize: int | None = None):
        super().__init__()
        check_lpips_resize(resize)
        self.resize = resize
        self.features = features
        self.heads = nn.ParameterList(heads)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet in [0, 1]
        self.register_buffer("shift", (2 * mean - 1).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", (2 * std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare images, differentiably in both.

        Args:
            a: images (B, 3, H, W) in [-1, 1].
            b: images of that shape.

        Returns:
            Distances (B,), float32 whatever autocast says.

        Raises:
            ValueError: where images are not RGB or smaller than 32x32.
        """
        check_lpips_shape(a.shape[1:])
        distance = a.new_zeros(len(a), dtype=torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            for head, x, y in zip(self.heads, self.levels(a), self.levels(b), strict=True):
                distance = distance + (head * (x - y).square()).sum(1).mean((1, 2))
        return distance

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """Yield five levels' features, unit vectors along dimension 1: (B, 64, H, W) to (B, 512, H // 16, W // 16)."""
        x = images.float()
        if self.resize is not None and min(x.shape[2:]) < self.resize:
            x = interpolate(x, (self.resize, self.resize), mode="bilinear")
        x = (x - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield _unit(x)
            x = layer(x)
        yield _unit(x)


def check_lpips_resize(resize: int | None) -> None:
    """Refuse a size that VGG-16 does not take.

    Args:
        resize: as of `LPIPS`.

    Raises:
        ValueError: for less than 32 pixels.
    """
    if resize is not None:
        check_counts(_SMALLEST, **{"method.lpips_resize": resize})


def check_lpips_shape(shape: Sequence[int]) -> None:
    """Refuse images that VGG-16 does not take.

    Args:
        shape: (C, H, W) of an image.

    Raises:
        ValueError: for other images than RGB ones of at least 32x32 pixels.
    """
    if len(shape) != 3 or shape[0] != 3 or min(shape[1:]) < _SMALLEST:
        raise ValueError(
            f"LPIPS is for RGB images of at least {_SMALLEST}x{_SMALLEST}, this data has {'x'.join(map(str, shape))}; "
            "choose another method.loss"
        )


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()  # where all features are zero, so is the gradient


def vgg16() -> nn.Sequential:
    """Make VGG-16's layers up to its last convolution, with torchvision's numbers as their names."""
    layers, before = [], 3
    for stage in STAGES:
        for channels in stage:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])

"""What the small classifiers trained here share: images in, features and ten classes out, half of the precision on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillhouse.checkpoints.weights import save_weights


class SmallClassifier(nn.Module):
    """A body from images (N, 1, H, W) with values in [-1, 1] to features (N, features), and one layer of ten classes."""

    def __init__(self, body: nn.Module, features: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, 10)

    def features(self, images: Tensor) -> Tensor:
        """(N, features), not negative; takes pixels 0 .. 255 of any dtype."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.features(images))


def save_halved(path: str | Path, classifier: SmallClassifier, card: Mapping[str, Any]) -> None:
    """Write the weights in half precision, with a card that says so; arguments and errors as of `save_weights`."""
    stored = {
        name: value.half() if value.is_floating_point() else value for name, value in classifier.state_dict().items()
    }
    save_weights(path, stored, {**card, "stored_as": "float16"})

"""The small digit classifier behind `fid_digits`, and its training: python -m stillhouse.metrics.digits_classifier"""

import argparse
import platform
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.metrics.small_classifier import SmallClassifier, save_halved

WEIGHTS = "pretrained/digits_classifier.safetensors"
FEATURES = 64


class DigitsClassifier(SmallClassifier):
    """Three convolutions and a layer of 64 rectified features, then ten classes. Images: uint8 (N, 1, 8, 8)."""

    def __init__(self):
        body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
            nn.ReLU(),
        )
        super().__init__(body, FEATURES)


def load_digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: uint8 (N, 1, 8, 8) with 0 .. 16 stretched to 0 .. 255, and int64 labels (N,)."""
    from sklearn.datasets import load_digits  # takes a second to import, and the extractor does without

    data = load_digits()
    pixels = np.round(data.images * 255 / 16).astype(np.uint8)
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(data.target.astype(np.int64))


def split_digits() -> tuple[Tensor, Tensor]:
    """Indices of the 1,437 training and 360 held-out digits, the same in every run, each class in proportion."""
    from sklearn.model_selection import train_test_split

    _, labels = load_digit_images()
    train, held_out = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels.numpy(), random_state=0)
    return torch.from_numpy(train), torch.from_numpy(held_out)


def classifier_accuracy(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 8, 8) that are classified as their labels (N,) say."""
    with torch.no_grad():
        return (classifier(images).argmax(dim=1) == labels).float().mean().item()


def train_classifier(seed: int, steps: int, batch_size: int = 128, learning_rate: float = 3e-3) -> DigitsClassifier:
    """Train on the training split with shifts of up to a pixel and slight noise.

    Dropout before the head keeps every feature in use, and soft labels keep the features from growing without bound:
    without them a quarter of the features is dead and the covariance is singular.
    """
    torch.manual_seed(seed)
    images, labels = load_digit_images()
    train_indices, _ = split_digits()
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        batch = train_indices[torch.randint(len(train_indices), (batch_size,))]
        features = functional.dropout(classifier.features(_augment(images[batch])), 0.3)
        loss = functional.cross_entropy(classifier.head(features), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def _augment(images: Tensor) -> Tensor:
    padded = functional.pad(images[:, 0], (1, 1, 1, 1))
    top, left = torch.randint(3, (2, len(images), 1)) + torch.arange(8)
    shifted = padded[torch.arange(len(images))[:, None, None], top[:, :, None], left[:, None, :]][:, None]
    return (shifted + 8 * torch.randn(shifted.shape)).clamp(0, 255)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digit classifier whose features fid_digits is measured in.")
    parser.add_argument("--output", default=WEIGHTS, help="the .safetensors file to write, its card beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    if Path(arguments.output).exists():
        parser.error(f"{arguments.output} exists already; move it away or choose another --output")
    torch.set_num_threads(1)  # sums in another order would give another file
    classifier = train_classifier(arguments.seed, arguments.steps)
    classifier.half().float()  # the file holds half precision: measure what it will give
    images, labels = load_digit_images()
    _, held_out = split_digits()
    card = {
        "command": f"python -m stillhouse.metrics.digits_classifier --seed {arguments.seed} --steps {arguments.steps}",
        "seed": arguments.seed,
        "steps": arguments.steps,
        "held_out_accuracy": classifier_accuracy(classifier, images[held_out], labels[held_out]),
        "held_out_images": len(held_out),
        "held_out_sha256": sha256(held_out.numpy().tobytes()).hexdigest(),
        "features": FEATURES,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": version("scikit-learn"),
            "numpy": np.__version__,
        },
        "licence": "Apache-2.0",
        "data": "scikit-learn's digits: UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0",
    }
    save_halved(arguments.output, classifier, card)
    print(f"{arguments.output}: held-out accuracy {card['held_out_accuracy']:.2%}")


if __name__ == "__main__":
    main()

"""The small classifiers of clothes behind `fid_fashion`, and their training:

python -m stillhouse.metrics.fashion_classifier --data data/fashion_mnist16
"""

import argparse
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.checkpoints.bounds import parse_json
from stillhouse.metrics.small_classifier import SmallClassifier, save_halved

RESOLUTIONS = (16, 32)
FEATURES = 64
HELD_OUT = 5000
POINTING_LEFT = (5, 7, 9)  # sandals, sneakers and boots: mirrored they are unlike the data


class FashionClassifier(SmallClassifier):
    """Convolutions on 16x16, 8x8 and 4x4 places, then a layer of 64 rectified features and ten classes.

    Args:
        resolution: Of images (N, 1, resolution, resolution): 16 or 32.
    """

    def __init__(self, resolution: int):
        body = nn.Sequential(
            _convolution(1, 32, stride=resolution // 16),
            _convolution(32, 32),
            nn.MaxPool2d(2),
            _convolution(32, 64),
            _Residual(64),
            nn.MaxPool2d(2),
            _convolution(64, 96),
            _Residual(96),
            nn.Flatten(),
            nn.Linear(96 * 4 * 4, FEATURES),
            nn.ReLU(),
        )
        super().__init__(body, FEATURES)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.body(hidden)


def _convolution(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.SiLU())


def weights_file(resolution: int) -> str:
    """Where the classifier of a resolution lies."""
    return f"pretrained/fashion{resolution}_classifier.safetensors"


def accuracy(classifier: FashionClassifier, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images uint8 (N, 1, H, W) that are classified as their labels (N,) say."""
    device = next(classifier.parameters()).device
    with torch.no_grad():
        found = [classifier(part.to(device)).argmax(1).cpu() for part in torch.from_numpy(images).split(500)]
    return (torch.cat(found).numpy() == labels).mean().item()


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    epochs: int,
    device: str = "cpu",
    batch_size: int = 250,
    learning_rate: float = 3e-3,
) -> FashionClassifier:
    """Train with shifts of up to a pixel of 16 (two of 32), and mirrored clothes.

    Dropout before the head keeps every feature in use, and soft labels keep the features from growing without bound.

    Args:
        images: uint8 (N, 1, side, side).
        labels: (N,), 0 .. 9.
        seed: Of weights, order, augmentation and dropout.
        epochs: Passes over the images, in one cycle of learning rates.
        device: Where it trains; another device gives other weights.

    Returns:
        The classifier, in evaluation mode, on the device.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = FashionClassifier(images.shape[-1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=1e-2)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    for epoch in range(epochs):
        total = torch.zeros((), device=device)
        for batch in torch.randperm(len(images), generator=generator)[: steps * batch_size].view(steps, -1).numpy():
            target = torch.from_numpy(labels[batch])
            shown = _augmented(torch.from_numpy(images[batch]), target, generator)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                features = classifier.features(shown.to(device, memory_format=torch.channels_last))
                logits = classifier.head(functional.dropout(features, 0.3))
            loss = functional.cross_entropy(logits.float(), target.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(f"epoch {epoch + 1} of {epochs}: loss {total.item() / steps:.4f}", flush=True)
    return classifier.to(memory_format=torch.contiguous_format).eval()


def _augmented(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    side = images.shape[-1]
    most = side // 16
    padded = functional.pad(images[:, 0], (most, most, most, most))
    top, left = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator) + torch.arange(side)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    mirrored &= ~torch.isin(labels, torch.tensor(POINTING_LEFT))
    left = torch.where(mirrored[:, None], left.flip(1), left)
    return padded[torch.arange(len(images))[:, None, None], top[:, :, None], left[:, None, :]][:, None]


def _split(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Images, labels and their hash, of a packed folder.

    Raises:
        FileNotFoundError: Nothing is packed there.
        ValueError: Its images are no clothes of a classifier's size, or have no labels.
    """
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(
            f"no packed images in {folder}; a run of data=fashion_mnist data.resolution=16 packs them"
        )
    meta = parse_json((folder / "meta.json").read_bytes())
    kind = [meta.get(key) for key in ("channels", "resolution", "classes")]
    if kind not in [[1, side, 10] for side in RESOLUTIONS]:
        raise ValueError(
            f"{folder} holds images of channels={kind[0]}, resolution={kind[1]}, num_classes={kind[2]}; pack grey ones of "
            f"{' or '.join(map(str, RESOLUTIONS))} pixels a side with ten classes, by a run of data=fashion_mnist"
        )
    images, labels = (np.load(folder / f"{name}.npy") for name in ("images", "labels"))
    return images, labels.astype(np.int64), meta["sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier whose features fid_fashion is measured in.")
    parser.add_argument(
        "--data", default="data/fashion_mnist16", help="the packed training images, with the test images in DATA/test"
    )
    parser.add_argument("--output", help="the .safetensors file to write, its card beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--device", default="cpu", help="cuda trains faster, and gives other weights than the CPU")
    arguments = parser.parse_args()
    folder = Path(arguments.data)
    try:
        images, labels, source = _split(folder)
        tests, test_labels, test_source = _split(folder / "test")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(images) < 2 * HELD_OUT:
        parser.error(f"{folder} holds {len(images):,} images, and {HELD_OUT:,} are held out: pack all 60,000")
    output = arguments.output or weights_file(images.shape[-1])
    if Path(output).exists():
        parser.error(f"{output} exists already; move it away or choose another --output")
    torch.set_num_threads(1)  # sums in another order would give another file
    classifier = train_classifier(
        images[:-HELD_OUT], labels[:-HELD_OUT], arguments.seed, arguments.epochs, arguments.device
    )
    classifier.half().float()  # the file holds half precision: measure what it will give
    card = {
        "command": f"python -m stillhouse.metrics.fashion_classifier --data {arguments.data} --seed {arguments.seed} "
        f"--epochs {arguments.epochs} --device {arguments.device}",
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "training_images": len(images) - HELD_OUT,
        "training_split_sha256": source,
        "held_out_images": HELD_OUT,
        "held_out_accuracy": accuracy(classifier, images[-HELD_OUT:], labels[-HELD_OUT:]),
        "test_images": len(tests),
        "test_split_sha256": test_source,
        "test_accuracy": accuracy(classifier, tests, test_labels),
        "features": FEATURES,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "licence": "Apache-2.0",
        "data": "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT licence",
    }
    save_halved(output, classifier, card)
    print(f"{output}: held-out accuracy {card['held_out_accuracy']:.2%}, test accuracy {card['test_accuracy']:.2%}")


if __name__ == "__main__":
    main()

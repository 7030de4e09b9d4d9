"""Images/s of the loader on synthetic 64x64 images, beside a DataLoader that fetches item by item, and one that reads PNGs."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from benchmarks.measuring import clock, summary
from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import PackedImages, pack

_CHUNK = 1000


class Synthetic(ImageDataModule):
    """`count` images of random pixels, with random labels."""

    def __init__(
        self, root: str, count: int, batch_size: int, resolution: int = 64, channels: int = 3, num_classes: int = 10
    ):
        sizes = {"resolution": resolution, "channels": channels, "num_classes": num_classes}
        super().__init__("synthetic", root, batch_size=batch_size, **sizes)
        self.count = count

    def convert(self, folder: Path) -> None:
        shape, generator = (self.channels, self.resolution, self.resolution), np.random.default_rng(0)
        sizes = (min(_CHUNK, self.count - start) for start in range(0, self.count, _CHUNK))
        chunks = (generator.integers(0, 256, (size, *shape), np.uint8) for size in sizes)
        labels = generator.integers(0, self.classes, self.count) if self.classes else None
        meta = {"name": self.name, "classes": self.classes, "source": "random pixels", "preprocessing": "none"}
        pack(folder, chunks, self.count, shape, labels=labels, meta=meta)


class PerItem(Dataset):
    """The same memory map, one image at a time."""

    def __init__(self, packed: PackedImages):
        self.images, self.labels = packed.images, packed.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.images[index])), self.labels[index]


def png_folder(folder: Path, packed: PackedImages) -> Path:
    """The same images as torchvision's ImageFolder wants them: one PNG each, in a folder for each class."""
    for label in range(packed.meta["classes"]):
        (folder / str(label)).mkdir(parents=True)
    for i, (pixels, label) in enumerate(zip(packed.images, packed.labels, strict=True)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / str(label) / f"{i:08d}.png")
    return folder


def measure(
    count: int = 20_000, batch_size: int = 64, rounds: int = 7, workers: tuple[int, ...] = (0, 2)
) -> dict[str, Any]:
    """Images/s over about an epoch at a time, one loader after the other; the first epochs, which map the pages, don't count.

    workers: of the DataLoaders on PNGs, which all give uint8 batches as ours.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = count // batch_size
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        data = Synthetic(folder, count, batch_size)
        packed = data.reference()
        endless, decoded = iter(data.train_dataloader()), iter(data.train_dataloader())
        shuffled = {"batch_size": batch_size, "shuffle": True, "generator": torch.Generator().manual_seed(0)}
        per_item = DataLoader(PerItem(packed), **shuffled)
        pictures = ImageFolder(png_folder(Path(folder) / "pictures", packed), PILToTensor())
        readers = {n: DataLoader(pictures, num_workers=n, persistent_workers=n > 0, **shuffled) for n in workers}

        def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)

        sources: dict[str, Callable[[], Iterator]] = {
            "images_per_second": lambda: endless,
            "decoded_images_per_second": lambda: map(on_device, decoded),
            "per_item_images_per_second": lambda: iter(per_item),
            **{f"png_{n}_workers_images_per_second": partial(iter, reader) for n, reader in readers.items()},
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(1 + rounds):
            for name, source in sources.items():
                begun = clock(device)
                seen = sum(1 for _ in islice(source(), batches))
                rates[name].append(seen * batch_size / (clock(device) - begun))
    kept = {name: values[1:] for name, values in rates.items()}

    def over(other: str) -> dict[str, float]:
        pairs = zip(kept["images_per_second"], kept[f"{other}_images_per_second"], strict=True)
        return summary([ours / theirs for ours, theirs in pairs])

    return {
        "title": f"loader, {count:,} shuffled images of 3x64x64 uint8",
        "device": str(device),
        "images": count,
        "batch_size": batch_size,
        **{name: summary(values) for name, values in kept.items()},
        "over_per_item": over("per_item"),
        **{f"over_png_{n}_workers": over(f"png_{n}_workers") for n in workers},
    }

"""Images/s of Inception's features, by batch size, in float32 as metrics take them and under bfloat16."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import clock, summary
from benchmarks.random_inception import write_inception
from stillhouse.metrics.extractors import Inception


def measure(batches: tuple[int, ...] = (8, 32), side: int = 32, rounds: int = 3) -> dict[str, Any]:
    """A part for each batch size, 2 or more, of images of `side` pixels, which Inception enlarges to 299; random weights.

    Metrics never take bfloat16's features, which differ as `bf16_difference` says: the norm of the difference over that of
    the features' spread around their mean, so that 1 would be no information at all.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        extractor = Inception(write_inception(Path(folder) / "inception.pth")).to(device)
    return {
        "title": "Inception features",
        "parts": [measure_one(extractor, size, side, rounds, device) for size in batches],
    }


def measure_one(extractor: Inception, size: int, side: int, rounds: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator).to(device)

    @torch.no_grad()
    def half() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return extractor._network(images)[0]  # the extractor itself turns autocast off

    calls = {"features": lambda: extractor(images), "bf16_features": half}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    found = {}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            begun = clock(device)
            found[name] = call()
            rates[name].append(size / (clock(device) - begun))
    kept = {name: values[1:] for name, values in rates.items()}
    exact = found["features"]
    ratios = [b / a for a, b in zip(kept["features"], kept["bf16_features"], strict=True)]
    return {
        "title": f"Inception features of images of {side}x{side}, random weights",
        "device": str(device),
        "batch_size": size,
        **{f"{name}_images_per_second": summary(values) for name, values in kept.items()},
        "bf16_over_float32": summary(ratios),
        "bf16_difference": ((found["bf16_features"] - exact).norm() / (exact - exact.mean(0)).norm()).item(),
    }

"""The device that is measured: its facts, and what its matrix products in bfloat16 reach by the data sheet."""

import re
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.measuring import machine

# Dense bfloat16 products accumulated in float32, TFLOP/s, from NVIDIA's data sheets and architecture papers, by what
# torch.cuda.get_device_name says.
_PEAKS = (
    (r"B200", 2250.0),
    (r"H100 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"H100|H200|H800|GH200", 989.4),
    (r"A100|A800", 312.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    (r"L40S", 362.1),
    (r"L40", 181.1),
    (r"L4", 121.0),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
)


def peak_tflops(card: str) -> float | None:
    """TFLOP/s of a card's dense bfloat16 products by its data sheet; None for a card that is not listed."""
    return next((peak for name, peak in _PEAKS if re.search(rf"\b(?:{name})\b(?! (?:D|Laptop|Max-Q))", card)), None)


def facts(device: str) -> dict[str, Any]:
    """The device to measure on, "cuda" or "cpu", and what stands there.

    Raises:
        ValueError: Where a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --device cpu is a dry run")
    found = {"device": device, **machine(), "lightning": version("pytorch-lightning"), "gpus": 0, "peak_tflops": None}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "peak_tflops": peak_tflops(card.name),
        }
    return found

"""What the benchmarks share: a clock, the summary of repeated figures, and the machine that they were taken on."""

import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds, with all work queued on `device` done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements, and how many there were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def spread(figures: dict[str, float], form: str = ".4g") -> str:
    """A summary for people: median (least .. greatest)."""
    return "{} ({} .. {})".format(*(format(figures[key], form) for key in ("median", "min", "max")))


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # resource's figure includes what the parent process held when it started this one
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)[1])
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict:
    """The processor, what this process may use of it, and how busy others keep it (mean over the last minute)."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def slug(machine: dict) -> str:
    """The GPU's name, else the CPU's, as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["cpu"]).lower()).strip("-")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

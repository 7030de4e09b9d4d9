"""Curves that are known by hand, as objects and as run folders."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf

from launch.run.folder import RunFolder
from stillhouse.analysis.curves import Cost, Curve
from stillhouse.metrics.records import Record, save_records

BATCH = 16
METRIC = "fid_digits_2k"
NOTHING = Cost()


def decay(rate: float, count: int = 30, floor: float = 0.0) -> list[float]:
    """floor + exp(-rate * i), which the trailing median of three delays by one measurement."""
    return [floor + math.exp(-rate * i) for i in range(count)]


def curve(group, values, *, seed=0, every=100, preparation=NOTHING, pace=0.5, metric=METRIC, weights="ema_10kimg"):
    """Measured first after `every` updates, with BATCH images and `pace` seconds each."""
    updates = [every * (i + 1) for i in range(len(values))]
    costs = tuple(Cost(u, BATCH * u, pace * u) for u in updates)
    return Curve(f"{group}-seed{seed}", group, seed, metric, weights, tuple(values), costs, preparation)


def stored(folders: Iterable[Path]) -> list[RunFolder]:
    """What comparisons read of these folders."""
    return [RunFolder(folder) for folder in folders]


def write_run(folder: Path, curve: Curve, raw: bool = False, **config) -> Path:
    """A complete run's folder with what a comparison reads of it; of every measurement two rows, one without metric."""
    folder.mkdir(parents=True)
    names = [f"{curve.metric}/{curve.weights}", *([f"{curve.metric}/raw"] if raw else [])]
    lines = [",".join(["step", "nimg", "loss", *names, "progress/student_updates", "speed/training_seconds"])]
    for cost, value in zip(curve.costs, curve.values, strict=True):
        values = [f"{value!r}", *([f"{2 * value!r}"] if raw else [])]
        lines.append(",".join([str(2 * cost.updates - 1), str(cost.images - 1), "1.0", *[""] * len(values), "", ""]))
        cells = [2 * cost.updates, cost.images, "", *values, cost.updates, cost.seconds]
        lines.append(",".join(map(str, cells)))
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    floor = Record(folder.name, "fid_digits", "real", 0, 0.1, None, [0.1], None, {"num_samples": 100})
    save_records(folder / "metrics.json", [floor])
    if curve.preparation != NOTHING:
        stored = {"steps": curve.preparation.updates, "images": curve.preparation.images}
        (folder / "preparation.json").write_text(json.dumps(stored | {"seconds": curve.preparation.seconds}))
    settings = {
        "name": folder.name,
        "folder": f"runs/{folder.name}",
        "seed": curve.seed,
        "method": {"name": curve.group, "seed": curve.seed},
        "data": {"name": "digits", "seed": curve.seed},
    }
    OmegaConf.save(OmegaConf.merge(settings, config), folder / "config.yaml")
    return folder

"""middle=search: at which noise level a student that renoises between two evaluations of a sample does best."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from launch.evaluate.measure import Evaluation
from launch.evaluate.trained_run import TrainedRun
from launch.run.build import build
from stillhouse.analysis.tables import text_table
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS
from stillhouse.files import write_ordered_json
from stillhouse.metrics.evaluation import DISTANCES
from stillhouse.pictures.plots import log_scale, save_figure

FILES = ("middle.json", "middle.png")
# For images in [-1, 1]; those that a student has no use for are left out.
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)


def search(run: TrainedRun, settings: Mapping[str, Any], device: torch.device) -> str:
    """Measure a student's samples of two evaluations by the noise level between them, and write `FILES`.

    The samples are of the seeds of measurements during training, as many as of those; the final evaluation has others.

    Args:
        run: The run with its student in place.
        settings: Of the measurement, as `evaluation_settings` makes them, of which the first metric is looked at.
        device: To compute on.

    Returns:
        A table.

    Raises:
        ValueError: For a student that does not renoise between two evaluations, or settings that can't be measured.
    """
    method = run.method.to(device)
    own = method.sampling(2)
    if own.solver != "renoising":
        raise ValueError(
            f"middle=search is for students that renoise between two evaluations, which {method.name}'s does not"
        )
    first, middle, end = own.sigmas
    levels = sorted({level for level in LEVELS if level < first} | {middle})
    evaluation = Evaluation(dict(settings), build(run.config.data), device, first_seed=MONITOR_SEEDS)
    if (metric := settings["metrics"][0]) not in DISTANCES:
        raise ValueError(
            f"middle=search looks for the least of a distance, which {metric} is not: metrics=[...] must begin with one of "
            f"{', '.join(DISTANCES)}"
        )
    records = []
    for level in levels:
        sampling = replace(own, sigmas=[first, level, end])
        records.append(evaluation.student(method, run.folder, run.weights, sampling)[0])
    values = [record.mean for record in records]
    best = levels[values.index(min(values))]
    content = {
        "metric": records[0].metric,
        "fingerprint": records[0].fingerprint,
        "provenance": records[0].provenance,
        "trained_with": middle,
        "best": best,
        "values": [{"level": level, "mean": value} for level, value in zip(levels, values, strict=True)],
    }
    folder = run.folder.path / "evaluation"
    write_ordered_json(folder / FILES[0], content)
    plot(folder / FILES[1], content)
    notes = {middle: "the method's", best: "least"} | ({best: "least, the method's"} if best == middle else {})
    rows = [[f"{level:g}", notes.get(level, ""), f"{value:.4g}"] for level, value in zip(levels, values, strict=True)]
    table = text_table([["middle", "", records[0].metric], *rows])
    return "\n".join([f"{run.folder.path}, two evaluations:", *table, f"{folder}/{FILES[0]} and {FILES[1]} written"])


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the metric over the level, with a line at the method's own."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    levels, values = zip(*((entry["level"], entry["mean"]) for entry in content["values"]), strict=True)
    axes.plot(levels, values, marker="o")
    axes.axvline(content["trained_with"], color="0.4", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    log_scale(axes, values)
    axes.set(xlabel="noise level of the second evaluation (dashed: the method's)", ylabel=content["metric"])
    axes.grid(alpha=0.25)
    save_figure(figure, path)

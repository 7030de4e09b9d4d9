"""curves.png: losses and generative metrics against kimg, plotted from metrics.csv."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from callbacks.components.intervals import interval_reached, is_last_step
from callbacks.ema import RAW
from callbacks.generative_metrics import GenerativeMetrics
from stillhouse.analysis.curves import read_metrics_csv, reference_lines
from stillhouse.files import write_file

if TYPE_CHECKING:  # training does without it until something is plotted
    import matplotlib.figure


class Curves(pl.Callback):
    """Plots <run folder>/curves.png after each evaluation of GenerativeMetrics and at the end of training.

    Reference lines come from <run folder>/monitoring.json if it is there.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        times = [callback.every_kimg for callback in trainer.callbacks if isinstance(callback, GenerativeMetrics)]
        if not is_last_step(trainer) and any(interval_reached(trainer, pl_module, every_kimg) for every_kimg in times):
            self._plot(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._plot(trainer)

    @rank_zero_only
    def _plot(self, trainer: pl.Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        if (folder / "metrics.csv").exists():
            plot_curves(folder / "metrics.csv", folder / "curves.png", reference_lines(folder / "monitoring.json"))


def plot_curves(
    csv_path: str | Path, png_path: str | Path, reference_lines: Mapping[str, Mapping[str, float]] | None = None
) -> "matplotlib.figure.Figure":
    """Plot a metrics.csv against kimg, one panel for the losses and one per generative metric.

    Losses are the columns loss, loss/... and heldout/...; a generative metric has one column for each kind of weights, such as
    fid_digits_1k/ema_0.999 and fid_digits_1k/raw.

    Args:
        csv_path: the table.
        png_path: the file to write.
        reference_lines: {metric: {label: value}}, drawn in the metric's panel.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    rows = read_metrics_csv(Path(csv_path))
    curves = {
        key: [(float(r["nimg"]) / 1000, float(r[key])) for r in rows if r[key]] for key in (rows[0] if rows else ())
    }
    panels: dict[str, list[str]] = {"loss": []}
    for key in curves:
        group, _, weights = key.rpartition("/")
        if key == "loss" or group in ("loss", "heldout"):
            panels["loss"].append(key)
        elif group and (weights == RAW or weights.startswith("ema_")):
            panels.setdefault(group, []).append(key)

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key in keys:
            kimg, values = np.array(curves[key]).reshape(-1, 2).T
            axes.plot(kimg, values, marker="." if len(values) < 30 else None, label=key)
        for number, (label, value) in enumerate((reference_lines or {}).get(title, {}).items()):
            axes.axhline(value, label=label, color="black", linewidth=1, linestyle=("--", ":", "-.")[number % 3])
        values = [v for key in keys for _, v in curves[key]]
        if title == "loss" and any(0 < v < math.inf for v in values):
            axes.set_yscale("symlog" if any(v < 0 for v in values) else "log")  # SiD's loss is mostly negative
        axes.set(title=title, xlabel="kimg")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(png_path, buffer.getvalue())
    return figure

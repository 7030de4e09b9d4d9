"""TensorBoard, whose files are written without a thread, so that a full disk is an error that names them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from stillhouse.analysis.curves import read_metrics_csv


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, writing by `callbacks.loggers.event_files`: scalars, and images through `experiment`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            from callbacks.loggers.event_files import EventFiles  # torch's own import takes a second

            self._experiment = EventFiles(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars; Lightning would report a full disk as values that can't be logged."""
        if (
            self._experiment is None
        ):  # the new file drops this step, of which a run resumed in a validation logs no more
            metrics = self._row(step) | dict(metrics)
        for key, value in metrics.items():
            self.experiment.add_scalar(key, float(value), step)

    def _row(self, step: int | None) -> dict[str, float]:
        """The values of a step in metrics.csv; `step` as Lightning numbers it."""
        table = Path(self.save_dir).parent / "metrics.csv"
        rows = read_metrics_csv(table) if table.is_file() else []
        row_of_step = next((row for row in rows if int(row["step"]) - 1 == step), {})
        return {key: float(value) for key, value in row_of_step.items() if value and key not in ("step", "nimg")}

    @rank_zero_only
    def save(self) -> None:
        """Nothing: the run folder has its config.yaml."""

"""TensorBoard: its files are written without a thread, and a disk that refuses them is named."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only


class TensorBoard(TensorBoardLogger):
    """Lightning's logger on `callbacks.event_files`; it logs scalars, and `experiment` pictures."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            from callbacks.event_files import EventFiles  # torch's own import takes a second

            self._experiment = EventFiles(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Lightning would say of a full disk that such values can't be logged."""
        for key, value in metrics.items():
            self.experiment.add_scalar(key, float(value), step)

    @rank_zero_only
    def save(self) -> None:
        """Nothing: the run folder has its config.yaml."""

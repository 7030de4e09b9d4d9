"""The quality of the student's samples during training, always of the same seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks.clock import Clock
from callbacks.components.evaluation_mode import evaluation_mode
from callbacks.components.intervals import check_every_kimg, interval_reached
from callbacks.ema import student_weights
from stillhouse.analysis.curves import metric_with_count
from stillhouse.checks import check_choice, check_integers
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS
from stillhouse.metrics.evaluation import (
    check_evaluation,
    check_held_out,
    check_real_features,
    check_real_images,
    measure_sampler,
    needs_held_out,
    needs_real_features,
)
from stillhouse.metrics.extractors import FeatureExtractor
from stillhouse.metrics.labels import DISTRIBUTIONS, check_class_shares, sampling_class_counts
from stillhouse.metrics.reference import Reference, published_reference, reference_statistics


class GenerativeMetrics(pl.Callback):
    """Measures samples of the seeds from MONITOR_SEEDS on, every `every_kimg` thousand images and at the end.

    The final evaluation has other seeds, so that a run chosen by its curves is not tuned on those.

    Logs fid_digits_1k/ema_0.999 and the like: metric and extractor, number of samples (values of different numbers can't be
    compared), weights. With `nfe` fid_digits_1k_2nfe/ema_0.999 is of samples of two network evaluations, where the method's own
    number is another one. Beside them progress/student_updates and speed/training_seconds (by Clock), to compare how fast
    methods converge. Sampling is in float32, shared by all processes, and leaves random state and modes as they were.

    It must come after EMA among the trainer's callbacks.
    """

    def __init__(
        self,
        every_kimg: float,
        num_samples: int,
        extractor: FeatureExtractor,
        metrics: Sequence[str] = ("fid",),
        ema_names: Sequence[str] | None = None,
        nfe: Sequence[int] | None = None,
        batch_size: int = 500,
        cache_folder: str | None = "data/statistics",
        reference: Mapping[str, Any] | None = None,
        labels: str = "uniform",
    ) -> None:
        """Choose what is measured.

        Args:
            every_kimg: interval in thousands of images.
            num_samples: of each measurement.
            extractor: of features.
            metrics: some of stillhouse.metrics.evaluation.METRICS.
            ema_names: averages by name, "raw" for the trained weights; None: the first average.
            nfe: network evaluations of a sample, each number measured; None: the method's own number.
            batch_size: images that are sampled at once.
            cache_folder: where statistics of the data set's images are kept; None: they are computed in every run.
            reference: published statistics in place of the data set's images, as evaluation.reference.
            labels: the distribution of classes, as evaluation.labels.

        Raises:
            ValueError: for options that can't be measured.
        """
        check_evaluation(metrics, num_samples, 1, batch_size, owner="callbacks.metrics")
        if reference is not None:
            check_real_features(metrics)
        self.every_kimg = check_every_kimg("GenerativeMetrics", every_kimg)
        self.num_samples, self.extractor, self.metrics = num_samples, extractor, list(metrics)
        self.nfe = None if nfe is None else check_integers("callbacks.metrics.nfe", nfe)
        self.ema_names, self.batch_size, self.cache_folder = ema_names, batch_size, cache_folder
        check_choice("GenerativeMetrics: labels", labels, DISTRIBUTIONS)
        self.published, self.labels = reference, labels
        self._class_counts: tuple[int, ...] | None = None
        self._reference: Reference | None = None

    def settings(self) -> dict[str, Any]:
        """Settings of an evaluation (conf/evaluation) that measures others as the student is measured here."""
        return {
            "extractor": self.extractor,
            "metrics": self.metrics,
            "num_samples": self.num_samples,
            "blocks": 1,
            "batch_size": self.batch_size,
            "reference": self.published,
            "labels": self.labels,
        }

    def check_method(self, method: pl.LightningModule) -> None:
        """Check that the student, as it is in training, can be sampled in each number of evaluations.

        Raises:
            ValueError: For a number that it is not trained for.
        """
        for count in self.nfe or ():
            try:
                method.sampling(count)
            except ValueError as error:
                raise ValueError(f"callbacks.metrics.nfe={list(self.nfe)}: {error}") from error

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        student_weights(trainer, self, self.ema_names)
        self._class_counts = sampling_class_counts(self.labels, pl_module.data)
        if self.published is not None:
            self._reference = published_reference(self.published, self.extractor)
            return
        check_real_images(self.metrics, len(pl_module.data.reference()), self.num_samples)
        check_held_out(self.metrics, pl_module.data.held_out())
        # Here, so that an extractor that does not fit the data is refused before training.
        self._reference = reference_statistics(
            pl_module.data.reference(),
            self.extractor,
            self.cache_folder,
            keep_features=needs_real_features(self.metrics),
            held_out=pl_module.data.held_out() if needs_held_out(self.metrics) else None,
            device=pl_module.device,
        )
        check_class_shares(self.labels, pl_module.data)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if interval_reached(trainer, pl_module, self.every_kimg):
            values = self.evaluate(trainer, pl_module)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
            values["progress/student_updates"] = pl_module.student_updates
            if clock := Clock.find(trainer):
                values["speed/training_seconds"] = clock.seconds()
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)  # Lightning's own number of this batch

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Measure now, on every rank; returns the values by the names under which they are logged."""
        own = pl_module.chosen_nfe
        # By number of evaluations, what is added to a metric's name.
        counts = {count: "" if count == pl_module.nfe else f"_{count}nfe" for count in self.nfe or ()} or {own: ""}
        values = {}
        try:
            with evaluation_mode(pl_module):
                for name, applied in student_weights(trainer, self, self.ema_names).items():
                    with applied(pl_module):
                        for count, suffix in counts.items():
                            pl_module.chosen_nfe = count
                            values |= self._measure(pl_module, name, suffix)
        finally:
            pl_module.chosen_nfe = own
        return values

    def _measure(self, pl_module: pl.LightningModule, weights: str, suffix: str) -> dict[str, float]:
        """Values of the student as it is now, by the names under which they are logged."""
        data = pl_module.data
        records = measure_sampler(
            pl_module.sample,
            name=pl_module.name,
            subject="student",
            nfe=pl_module.nfe,
            reference=self._reference,
            extractor=self.extractor,
            num_samples=self.num_samples,
            blocks=1,
            shape=(data.channels, data.resolution, data.resolution),
            num_classes=data.num_classes,
            batch_size=self.batch_size,
            device=pl_module.device,
            metrics=self.metrics,
            weights=weights,
            class_counts=self._class_counts,
            first_seed=MONITOR_SEEDS,
            progress=False,
        )
        return {f"{metric_with_count(r.metric, self.num_samples)}{suffix}/{weights}": r.mean for r in records}

"""What a run or a teacher is worth: samples of fixed seeds -> metrics, a table and pictures."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from omegaconf import DictConfig

from launch.evaluate.trained_run import Weights, choose_steps
from launch.run.folder import RunFolder
from launch.run.precision import allow_tf32
from lightning_modules import Method
from stillhouse.analysis.compare_quality import draw_measured
from stillhouse.analysis.tables import records_text
from stillhouse.checkpoints.weights import hash_state
from stillhouse.checks import check_choice, check_memory
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.files import check_writable, write_cache
from stillhouse.metrics.evaluation import (
    check_evaluation,
    check_feature_memory,
    check_held_out,
    check_real_features,
    check_real_images,
    measure_real_images,
    measure_sampler,
    needs_held_out,
    needs_real_features,
)
from stillhouse.metrics.extractors import FeatureExtractor
from stillhouse.metrics.fidelity import NO_WEIGHTS_ADVICE
from stillhouse.metrics.labels import DISTRIBUTIONS, check_class_shares, check_classes, sampling_class_counts
from stillhouse.metrics.provenance import with_provenance
from stillhouse.metrics.records import Record, load_records, merge_records, save_records
from stillhouse.metrics.reference import Reference, published_reference, reference_statistics
from stillhouse.metrics.sampling import Sampler
from stillhouse.pictures.samples import image_shape, save_final_pictures
from stillhouse.ranks import rank_and_world, run_on_rank_zero


class OnTheWay(TypedDict, total=False):
    """Of measurements during training."""

    every_kimg: float
    num_samples: int
    nfe: Sequence[int] | None


class EvaluationOptions(TypedDict, total=False):
    """conf/evaluation. Which are missing, and what null and a text for a list mean, `checked` says."""

    extractor: FeatureExtractor | None
    metrics: Sequence[str] | str | None
    num_samples: int
    blocks: int
    batch_size: int
    reference: Mapping[str, str | None] | None
    labels: str
    training: OnTheWay


SETTINGS = EvaluationOptions.__annotations__.keys() - {"training"}


class Evaluation:
    """The settings of one evaluation (conf/evaluation) with the data set's reference: what all subjects share.

    With published statistics (evaluation.reference) the data's images are never asked for: no floor is measured, and no picture
    shows them. Blocks of seeds begin at `first_seed`. With evaluation=none there are pictures alone.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        data: Any,
        device: torch.device,
        cache: str | Path = "data",
        first_seed: int = 0,
    ):
        allow_tf32(False)
        self.settings = checked(settings, data)
        self.data, self.device, self.first_seed = data, device, first_seed
        self.cache = Path(cache)
        self.measures = bool(self.settings)
        check_data(self.settings, data)
        if not self.measures:
            self.has_images = data.folder.exists()
            return
        self.extractor = self.settings.pop("extractor").to(device)
        published, labels = self.settings.pop("reference"), self.settings.pop("labels")
        self.has_images = published is None
        self.class_counts = sampling_class_counts(labels, data)
        self.reference: Reference
        if published is not None:
            self.reference = published_reference(published, self.extractor).to(device)
            return
        self.reference = reference_statistics(
            data.reference(),
            self.extractor,
            self.cache / "statistics",
            keep_features=needs_real_features(self.settings["metrics"]),
            held_out=data.held_out() if needs_held_out(self.settings["metrics"]) else None,
            device=device,
        )
        if not first_seed:  # on the way GenerativeMetrics has said it
            check_class_shares(labels, data)

    @property
    def shape(self) -> tuple[int, int, int]:
        return image_shape(self.data)

    def _common(self, num_classes: int) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "extractor": self.extractor,
            "num_classes": num_classes,
            "class_counts": self.class_counts if num_classes else None,
            "device": self.device,
            "first_seed": self.first_seed,
            **self.settings,
        }

    def run(self, method: Method, folder: RunFolder, weights: Weights, counts: Sequence[int] = ()) -> list[Record]:
        """Records of a method's teacher, its student and real images, all against the same reference.

        The student's weights are in place already; `weights` says which they are. counts: numbers of
        steps to measure the student at, one after the other (none: the method's own).
        """
        if not self.measures:
            return []
        students = [] if counts else self.student(method, folder, weights)
        for count in counts:
            students += self.student(method, folder, choose_steps(method, folder, count, weights))
        teacher = self.teacher(method.teacher) if method.teacher else []
        return teacher + students + self.real()

    def student(
        self, method: Method, folder: RunFolder, weights: Weights, sampling: Sampling | None = None
    ) -> list[Record]:
        """Records of a method's student as it samples now, or by another path from noise to images."""
        records = measure_sampler(
            partial(method.sample, sampling=sampling) if sampling else method.sample,
            name=folder.name,
            subject="student",
            nfe=sampling.nfe if sampling else method.nfe,
            shape=self.shape,
            weights=weights.name,
            teacher=method.teacher.name if method.teacher else None,
            **self._common(self.data.num_classes),
        )
        records = with_provenance(records, folder.config, hash_state(method.exported()))
        return [replace(record, training=weights.training) for record in records]

    def teacher(self, teacher: Teacher, steps: int | None = None) -> list[Record]:
        """Records of a teacher; kept on disk by all that they depend on, since a sweep asks for the same ones again."""
        teacher.to(self.device)
        key = self._teacher_key(teacher, steps)
        path = self.cache / "measured" / f"{teacher.name}-{key[:16]}.json"
        stored = run_on_rank_zero(lambda: load_records(path) if path.exists() else None)
        if stored is not None:
            return stored
        records = measure_sampler(
            lambda noise, labels: teacher.sample(noise, labels, steps),
            name=teacher.name,
            subject="teacher",
            nfe=teacher.nfe(steps),
            shape=self.shape,
            steps=len(teacher.sigmas(steps)) - 1,
            solver=teacher.solver_name,
            **self._common(teacher.num_classes),
        )
        records = with_provenance(records, key, teacher.hash)
        run_on_rank_zero(lambda: write_cache(lambda: save_records(path, records)))
        return records

    def _teacher_key(self, teacher: Teacher, steps: int | None) -> str:
        """A hash of all that the measurement depends on."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        key = {
            "teacher": teacher.hash,
            "form": teacher.form,
            "solver": teacher.solver_name,
            "sigmas": teacher.sigmas(steps).tolist(),
            "num_classes": teacher.num_classes,
            "extractor": self.extractor.hash,
            "reference": self.reference.hash,
            "device": device,
            **self.settings,
        }
        if teacher.num_classes and self.class_counts:
            key["class_counts"] = self.class_counts
        if self.reference.held_out_hash:
            key["held_out"] = self.reference.held_out_hash
        if self.first_seed:
            key["first_seed"] = self.first_seed
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def real(self) -> list[Record]:
        """The floor: real images, of those held out where there are any, against all that are trained on.

        None where there are only their statistics.
        """
        if not self.has_images:
            return []
        settings = {"held_out": self.data.held_out(), **self._common(self.data.num_classes)}
        records = measure_real_images(self.data.reference(), name=self.data.name, **settings)
        return with_provenance(records, None, None)

    def pictures(self, folder: Path, samplers: dict[str, Sampler]) -> None:
        """samples.png and interpolation.png in `folder`, of samplers {title: function of (noise, labels)}."""
        if rank_and_world()[0] == 0:
            save_final_pictures(folder, samplers, self.data, self.device, with_real=self.has_images)


def measures_nothing(settings: Mapping[str, Any]) -> bool:
    """Whether these are those of evaluation=none."""
    return settings.get("extractor") is None and settings.get("metrics") is None


def leave_out_measurement(cfg: DictConfig) -> None:
    """In place: with evaluation=none a run measures nothing on the way either.

    Raises:
        ValueError: For one that can't measure.
    """
    if not measures_nothing(cfg.evaluation):
        _check_extractor(cfg.evaluation)
    elif "metrics" in (cfg.callbacks or {}):
        cfg.callbacks.metrics = None


def _check_extractor(settings: Mapping[str, Any]) -> None:
    if settings.get("extractor", "missing") is None:
        raise ValueError(f"evaluation.extractor=null: without one nothing can be measured; {NO_WEIGHTS_ADVICE}")


def needs_images(settings: Mapping[str, Any]) -> bool:
    """Whether a measurement looks at the data's images or labels: published statistics do in their place, but for labels."""
    published = settings.get("reference") and settings.get("labels") != "data"
    return not published and not measures_nothing(settings)


def checked(settings: dict[str, Any], data: Any) -> dict[str, Any]:
    """The settings of a final evaluation, without those of measurements on the way; empty where nothing is to be measured.

    Raises:
        ValueError: For impossible ones, also for an extractor that can't read images as the data's.
    """
    if measures_nothing(settings):
        return {}
    _check_extractor(settings)
    final = {"reference": None, "labels": "uniform"} | {
        key: value for key, value in settings.items() if key != "training"
    }
    if odd := SETTINGS.symmetric_difference(final):
        raise ValueError(
            f"evaluation needs {', '.join(sorted(SETTINGS))}; unknown or missing: {', '.join(sorted(odd))}"
        )
    check_evaluation(**{key: value for key, value in final.items() if key not in ("extractor", "reference", "labels")})
    check_choice("evaluation.labels", final["labels"], DISTRIBUTIONS)
    check_feature_memory(
        final["extractor"].dim, final["num_samples"], final["blocks"], has_images=final["reference"] is None
    )
    if final["reference"] is not None:
        check_real_features(final["metrics"])
        published_reference(final["reference"], final["extractor"])
    # A fast one would be compiled for a single image.
    exact = getattr(final["extractor"], "exact", None) or final["extractor"]
    exact.to("cpu")(torch.zeros(1, *image_shape(data), dtype=torch.uint8))  # after training it is on the run's device
    at_once = min(final["batch_size"], final["num_samples"])
    noise = 16 * math.prod(image_shape(data))  # bytes of an image's: the words that it is made of, and itself
    check_memory(noise * at_once, f"evaluation.batch_size={at_once} (lower it): the noise of a batch")
    return final


def check_data(settings: Mapping[str, Any], data: Any) -> None:
    """Refuse data of too few images for the metrics and classes of `checked` settings; packs them where they are not yet."""
    if needs_images(settings):
        check_real_images(settings["metrics"], len(data.reference()), settings["num_samples"])
        check_held_out(settings["metrics"], data.held_out())
        check_classes(settings["labels"], data)


RESULT_FILES = ("metrics.json", "samples.png", "interpolation.png", "quality.png")


def check_results(folder: Path) -> None:
    """Check, before hours of measuring, that `write_results` can write there.

    Raises:
        OSError: Where it can't.
        ValueError: For damaged records of other measurements.
    """
    for name in RESULT_FILES:
        check_writable(folder / name)
    _stored_records(folder)


def _stored_records(folder: Path) -> list[Record]:
    path = folder / "metrics.json"
    return load_records(path) if path.exists() else []


def write_results(
    folder: Path, records: Sequence[Record], evaluation: Evaluation, samplers: Mapping[str, Sampler]
) -> None:
    """Write `RESULT_FILES`: records, added to those of other measurements that are there, and pictures.

    Args:
        folder: The place of the files.
        records: What was measured.
        evaluation: How.
        samplers: What the pictures show, by title.

    Raises:
        OSError: Where the disk refuses.
    """
    path = folder / "metrics.json"
    save_records(path, merge_records(_stored_records(folder), records))
    evaluation.pictures(folder, dict(samplers))
    draw_measured(folder / "quality.png", records)
    print(f"{path} written", flush=True)


def print_table(records: Sequence[Record]) -> None:
    """Print the records' table, if there are any."""
    if records:
        print(f"\n{records_text(records)}", flush=True)

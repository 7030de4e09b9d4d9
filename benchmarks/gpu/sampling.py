"""Images/s of teacher, student and Inception, and how long a FID takes from the first noise to the number."""

from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.cases import ARCHITECTURES
from benchmarks.gpu.inception import random_inception
from benchmarks.gpu.stages import Entry, Setting, Stage
from benchmarks.gpu.worker import PASSED, Row
from benchmarks.measuring import clock, spread, summary
from benchmarks.methods import config
from launch.run.build import build_seeded
from launch.run.precision import allow_tf32
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.diffusion.sampling import one_step_sampling
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.distances import frechet_distance
from stillhouse.metrics.extractors import Pixels
from stillhouse.metrics.sampling import sample_features
from stillhouse.metrics.statistics import RunningGaussian

_SIGMA = 2.5  # the student's noise level
_HEUN = 18  # steps, with 35 evaluations
_SECONDS = 2.0  # of measured calls, and as many calls as that takes
_CALLS, _LONGEST = 3, 10.0  # at least so many calls, unless they have taken so many seconds
TEACHER, STUDENT, INCEPTION, FID = "teacher", "student", "inception", "fid"


def entries(setting: Setting) -> Iterator[Entry]:
    """What a run does most first. In float32 throughout, as metrics are; bf16 is evaluation.extractor.precision."""
    if setting.dry:
        yield _entry(STUDENT, "tiny", 4)
        yield _entry(TEACHER, "tiny", 4)
        yield _entry(FID, "tiny", 16, count=40)
        yield _entry(INCEPTION, None, 2)
        return
    yield _entry(STUDENT, "cifar10", 512)
    yield _entry(TEACHER, "cifar10", 128)
    yield _entry(INCEPTION, None, 512)
    yield _entry(INCEPTION, None, 512, "bf16")
    yield _entry(FID, "cifar10", 512, count=10_000)
    yield _entry(FID, "cifar10", 512, count=50_000)
    yield _entry(TEACHER, "cifar10", 512)
    yield _entry(STUDENT, "imagenet64", 128)
    yield _entry(TEACHER, "imagenet64", 64)


def _entry(what: str, architecture: str | None, batch: int, precision: str = "32", count: int | None = None) -> Entry:
    options = {
        "what": what,
        "architecture": architecture,
        "batch_size": batch,
        "precision": precision,
        "count": count,
    }
    network = f", {architecture}" if architecture else ""
    images = f" of {count:,}" if count else ""
    half = f", {precision}" if precision != "32" else ""
    name = f"{what}{images}{network}, batch {batch}{half}"
    if count:
        return Entry(name, options, limit=30 + count / 200, least=1 + count / 700)
    return Entry(name, options, limit=60, least=1 if architecture == "tiny" else 5)


def measure(setting: Setting, options: dict[str, Any], seconds: float) -> Row:
    """Rates, or the phases of a FID."""
    allow_tf32(False)
    device = torch.device(setting.device)
    if options["what"] == INCEPTION:
        return _inception(options, device, setting.dry)
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = config(ARCHITECTURES[options["architecture"]], folder, "method=diff_instruct")
    teacher: Teacher = build_seeded(cfg.teacher, cfg.seed).to(device)
    if options["what"] == FID:
        return _fid(teacher, options, device, setting.dry)
    seeds = torch.arange(options["batch_size"], device=device)
    noise = sample_noise(seeds, (teacher.channels, teacher.resolution, teacher.resolution))
    labels = sample_labels(seeds, teacher.num_classes)
    student = one_step_sampling(teacher.denoiser, _SIGMA)
    teacher.solver, teacher.solver_options = "heun", {}
    calls = {
        STUDENT: (lambda: student(teacher.denoiser, noise, labels), student.nfe),
        TEACHER: (lambda: teacher.sample(noise, labels, steps=_HEUN), teacher.nfe(_HEUN)),
    }
    with torch.no_grad():
        call, nfe = calls[options["what"]]
        return {"nfe": nfe, **_rates(call, options["batch_size"], device, setting.dry)}


def _rates(call: Callable[[], Any], images: int, device: torch.device, dry: bool) -> Row:
    call()
    seconds: list[float] = []
    while not seconds or (not dry and sum(seconds) < (_LONGEST if len(seconds) < _CALLS else _SECONDS)):
        begun = clock(device)
        call()
        seconds.append(clock(device) - begun)
    return {"images_per_second": summary([images / value for value in seconds])}


def _inception(options: dict[str, Any], device: torch.device, dry: bool) -> Row:
    extractor, source = random_inception(options["precision"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options["batch_size"], 3, 32, 32), dtype=torch.uint8, generator=generator)
    images, extractor = images.to(device), extractor.to(device)
    return {"network": source, **_rates(lambda: extractor(images), options["batch_size"], device, dry)}


def _fid(teacher: Teacher, options: dict[str, Any], device: torch.device, dry: bool) -> Row:
    """Of images of random weights, to statistics of random ones: the number means nothing, the seconds do."""
    extractor, source = (Pixels(), "pixels") if dry else random_inception()
    student = one_step_sampling(teacher.denoiser, _SIGMA)
    reference = torch.randn(2 * extractor.dim, extractor.dim, device=device, dtype=torch.float64)
    size = {"shape": (teacher.channels, teacher.resolution, teacher.resolution), "num_classes": teacher.num_classes}

    def features(count: int) -> tuple[torch.Tensor, float]:
        return sample_features(
            lambda noise, labels: student(teacher.denoiser, noise, labels),
            extractor,
            torch.arange(count),
            **size,
            batch_size=options["batch_size"],
            device=device,
        )

    features(options["batch_size"])  # once, for libraries that choose their kernels
    begun = clock(device)
    rows, sampling = features(options["count"])
    extracted = clock(device)
    gaussian = RunningGaussian(extractor.dim, device).update(rows)
    mean, covariance = gaussian.mean, gaussian.cov
    collected = clock(device)
    frechet_distance(mean, covariance, reference.mean(0), reference.T.cov())
    ended = clock(device)
    return {
        "network": source,
        "seconds": {
            "sampling": sampling,
            "features": extracted - begun - sampling,
            "statistics": collected - extracted,
            "distance": ended - collected,
            "all": ended - begun,
        },
    }


def table(rows: Sequence[Row]) -> list[str]:
    """Rates, and below them the phases of each FID."""
    passed = [row for row in rows if row["status"] == PASSED]
    lines = [
        "| what | network | batch | precision | evaluations | images/s (least .. greatest) |",
        "|---|---|--:|---|--:|--:|",
    ]
    for row in passed:
        if row["what"] != FID:
            lines.append(
                f"| {row['what']} | {row['architecture'] or row['network']} | {row['batch_size']} | {row['precision']} "
                f"| {row.get('nfe', '')} | {spread(row['images_per_second'], ',.4g')} |"
            )
    distances = [row for row in passed if row["what"] == FID]
    if distances:
        lines += ["", "| FID of | images by, features by | sampling | features | statistics | distance | all |"]
        lines.append("|--:|---|--:|--:|--:|--:|--:|")
    for row in distances:
        phases = " | ".join(f"{seconds:.3g} s" for seconds in row["seconds"].values())
        lines.append(f"| {row['count']:,} | one step of {row['architecture']}, {row['network']} | {phases} |")
    return lines


SAMPLING = Stage("sampling", "sampling, features and FID", entries, measure, table)

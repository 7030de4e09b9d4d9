"""task=self_test: test a teacher's noise levels, labels and pixel range, as a table, JSON and a picture."""

from pathlib import Path
from typing import Any, NotRequired

import torch
from omegaconf import DictConfig
from torch import Tensor

from launch.evaluate.options import TeacherOptions, compute_device, fetch_missing
from launch.evaluate.teacher import teacher_folder
from launch.run.build import build, build_seeded, check_teacher
from stillhouse.analysis.tables import text_table
from stillhouse.diffusion.teacher import Teacher
from stillhouse.files import check_writable, write_json
from stillhouse.metrics.images import from_uint8
from stillhouse.metrics.self_test import SelfTest, self_test
from stillhouse.pictures.self_test import plot_self_test

IMAGES = 64


class Options(TeacherOptions):
    """conf/task/self_test.yaml. The data's config brings an evaluation, which a self-test does not use."""

    evaluation: NotRequired[Any]
    device: str
    download: bool


def main(cfg: DictConfig) -> None:
    """Test the teacher, print the report, and leave check.json and check.png in runs/teacher-NAME.

    Raises:
        ValueError: Where a check fails, after all has been written.
        OSError: Where results could not be written, or weights are missing.
    """
    folder, device = teacher_folder(cfg), compute_device(cfg.device)
    for name in ("check.json", "check.png"):
        check_writable(folder / name)
    fetch_missing(cfg, "teacher", "data")
    teacher, data = build_seeded(cfg.teacher, cfg.seed), build(cfg.data)
    check_teacher(teacher, data)
    result = self_test(teacher, known_images(data), range(IMAGES), device)
    write_json(folder / "check.json", content(teacher, result))
    plot_self_test(folder / "check.png", result, teacher.name)
    print(f"\n{write_self_test(result, folder)}")
    if result.failed:
        failed = "; ".join(f"{one.name} ({one.text})" for one in result.failed)
        raise ValueError(
            f"teacher {teacher.name} fails its self-test: {failed}; see {folder}/check.png and correct its config"
        )


def known_images(data: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return the same real images every time, float32 in [-1, 1], with their labels; None where the data set is missing."""
    try:
        packed = data.reference()
    except FileNotFoundError:
        return None
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))
    images, labels = packed.fetch(order[:IMAGES].numpy())
    return from_uint8(images), labels


def content(teacher: Teacher, result: SelfTest) -> dict[str, Any]:
    """Return what check.json holds."""
    return {
        "teacher": teacher.name,
        "hash": teacher.hash,
        "images": f"{len(result.images)} {'real ones' if result.real else 'of its own samples'}",
        "checks": [{"name": one.name, "passed": one.passed, "text": one.text} for one in result.checks],
        "levels": [{"sigma": one.sigma, "error": one.error, "linear": one.linear} for one in result.levels],
        "readings": result.scores,
    }


def write_self_test(result: SelfTest, folder: Path) -> str:
    """Return the tables of denoising errors by noise level and of checks."""
    header = ["sigma", "", "error in x0", "linear", "in eps", "in v", "in velocity"]
    rows = [
        [f"{one.sigma:.4g}", "", *(f"{value:.4f}" for value in (one.error, one.linear, one.eps, one.v, one.velocity))]
        for one in result.levels
    ]
    marks = {True: "passed", False: "FAILED", None: "not made"}
    checks = [["check", "", "result"], *([one.name, marks[one.passed], one.text] for one in result.checks)]
    width = max(len(row[0]) for row in checks)
    lines = [f"{name.ljust(width)}  {mark:8}  {text}" for name, mark, text in checks]
    images = "real images" if result.real else "its own samples: no real images are here"
    return "\n".join([*text_table([header, *rows]), "", *lines, "", f"on {images}; {folder}/check.png written"])

"""evaluate.py with several runs that have curves: tables, convergence.json and convergence.png."""

import csv
import json
import shutil

import pytest
from end_to_end_tools import RUN, evaluate, snapshot, with_data
from matplotlib.image import imread
from omegaconf import OmegaConf

SETTINGS = ("device=cpu", "num_samples=20", "blocks=1")


def variant(source, folder, seed, lr, updates, seconds):
    """A copy of the finished run with another seed and lr, whose three measurements are 9, 1 and 1."""
    shutil.copytree(source, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.seed = config.method.seed = config.data.seed = seed
    config.method.lr = lr
    config.name, config.folder = folder.name, f"runs/{folder.name}"
    OmegaConf.save(config, folder / "config.yaml")
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = next(key for key in rows[0] if key.startswith("fid_digits_20/ema_"))
    measured = [row for row in rows if row[column]]
    for i, (row, value) in enumerate(zip(measured, (9.0, 1.0, 1.0), strict=True), start=1):
        row |= {column: value, "progress/student_updates": i * updates, "speed/training_seconds": i * seconds}
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """Seeds 0 and 1 at lr 0.001 and, with 13.09 times the speed and a preparation, at lr 0.002."""
    folder = with_data(finished, tmp_path_factory.mktemp("convergence"))
    for seed in (0, 1):
        variant(finished / RUN, folder / f"runs/slow{seed}", seed, 0.001, 1309, 130.9)
        fast = variant(finished / RUN, folder / f"runs/fast{seed}", seed, 0.002, 100, 10.0)
        (fast / "preparation.json").write_text('{"steps": 900, "images": 9000, "seconds": 462.7}')
    return folder


def test_several_runs_are_compared_with_the_first(folder):
    ended = evaluate(folder, "run=[runs/slow*,runs/fast*]", *SETTINGS).ok()
    records, _, comparison = ended.out.partition("Convergence of ")
    assert "fingerprint" in records
    assert "denoising_student lr=0.001 (baseline)" in comparison
    rows = [line for line in comparison.splitlines() if "x (" in line]
    assert len(rows) == 6  # three thresholds, with and without the preparation
    assert all("denoising_student lr=0.002" in row for row in rows)
    assert rows[0].count("13.1x (13.1 .. 13.1)") == 2  # updates and seconds; as many images
    assert rows[0].count("1.00x (1.00 .. 1.00)") == 1
    assert "3.27x (3.27 .. 3.27)" in rows[1]  # 3,927 updates against 300 and 900 steps
    assert "0.797x (0.797 .. 0.797)" in rows[1]  # 392.7 seconds against 30 and 462.7
    assert comparison.rstrip().endswith("runs/comparison/convergence.json and convergence.png written")
    content = json.loads((folder / "runs/comparison/convergence.json").read_text())
    assert [r["name"] for r in content["runs"]] == ["slow0", "slow1", "fast0", "fast1"]
    assert content["metric"] == "fid_digits_20"
    picture = imread(folder / "runs/comparison/convergence.png")
    assert picture.shape[1] > 2 * picture.shape[0]


@pytest.mark.slow
def test_runs_without_curves_are_named_and_the_table_stands(folder):
    shutil.copytree(folder / "runs/fast0", folder / "runs/other")
    (folder / "runs/other/metrics.csv").unlink()
    before, there = snapshot(folder / "runs/slow0"), {path.name for path in (folder / "runs").iterdir()}
    options = ("weights=ema_500kimg", "comparison=runs/with_other", *SETTINGS)
    ended = evaluate(folder, "run=[runs/slow0,runs/other]", *options).ok()
    assert ended.out.index("fingerprint") < ended.out.index("Convergence of")
    assert "note: runs/other left out of the comparison: no runs/other/metrics.csv" in ended.out
    assert "Times faster" not in ended.out
    ended = evaluate(folder, "run=[runs/other,runs/slow0]", *SETTINGS, "comparison=runs/none").ok()
    assert "convergence not compared: no curve of the baseline denoising_student lr=0.002\n" in ended.out
    ended = evaluate(folder, "run=[runs/slow0,runs/slow1]", *SETTINGS, "comparison=null").ok()
    assert "onvergence" not in ended.out
    assert {path.name for path in (folder / "runs").iterdir()} - there == {"with_other"}
    after = snapshot(folder / "runs/slow0")
    assert {k: v for k, v in before.items() if not k.startswith("evaluation/")} == {
        k: v for k, v in after.items() if not k.startswith("evaluation/")
    }

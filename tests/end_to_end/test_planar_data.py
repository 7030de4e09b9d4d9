"""Points of the plane from the command line: trained, measured and pictured as images are."""

import numpy as np
import pytest
from end_to_end_tools import RUN, TINY, evaluate, read_json, train
from matplotlib.image import imread

# A network that keeps its size: it is small as it is.
OPTIONS = (*(o for o in TINY if "model_channels" not in o), "data=eight_gaussians", "data.points=500")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a complete run of method=pretrain."""
    folder = tmp_path_factory.mktemp("planar")
    train(folder, *OPTIONS, "method=pretrain").ok()
    return folder


def test_a_run_leaves_its_distances_and_scatter_plots(pretrained):
    folder = pretrained / RUN
    values = {(r["metric"], r["subject"]): r["mean"] for r in read_json(folder / "metrics.json")}
    assert set(values) == {(m, s) for m in ("w2_points", "mmd_points") for s in ("student", "real")}
    assert values["w2_points", "real"] < values["w2_points", "student"]
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "fid_points_20/ema" in header
    for path in (folder / "samples.png", *(folder / "samples").glob("*.png")):
        assert (np.ptp(imread(path)[:, :, :3], axis=2) > 0.2).sum() > 100, "samples in colour"
    assert min(imread(folder / "interpolation.png").shape[:2]) > 300


@pytest.mark.slow
def test_its_student_is_a_teacher_and_is_measured_beside_the_run(pretrained):
    options = (o for o in OPTIONS if not o.startswith(("name=", "teacher.w")))
    sfd = ("method=sfd", "method.lr=1e-4", f"teacher={RUN}", *options)
    train(pretrained, "name=sfd", *sfd).ok()
    values = {r["subject"] for r in read_json(pretrained / "runs/sfd/metrics.json")}
    assert values == {"teacher", "student", "real"}
    measured = evaluate(
        pretrained, f"run=[{RUN},runs/sfd]", "num_samples=30", "blocks=1", "metrics=[w2]", "device=cpu"
    ).ok()
    assert "w2_points" in measured.out
    assert (pretrained / "runs/sfd/evaluation/samples.png").is_file()


def test_too_many_samples_are_refused_before_training(tmp_path):
    options = ("evaluation.num_samples=6000" if o.startswith("evaluation.num_samples=") else o for o in OPTIONS)
    train(tmp_path, *options, "method=pretrain").refused("w2 takes at most 5000 samples, got num_samples=6000")
    assert not (tmp_path / RUN / "config.yaml").exists()

"""Statistics in place of images: what is measured without a data set, and what is refused."""

from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from metric_stubs import SHAPE, Stub, sampler, stub_reference
from PIL import Image

from launch.evaluate.flows import FlowMeasurement
from launch.evaluate.measure import Evaluation, checked
from launch.evaluate.trained_run import Weights
from launch.run.folder import RunFolder
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.metrics.distances import frechet_distance
from stillhouse.metrics.images import to_uint8
from stillhouse.metrics.reference import published_reference
from stillhouse.metrics.statistics import RunningGaussian, save_statistics

SETTINGS = {"metrics": ["fid"], "num_samples": 30, "blocks": 2, "batch_size": 16}
CPU = torch.device("cpu")


class NoImages:
    """A data set that is not here."""

    name, channels, resolution, num_classes = "absent", SHAPE[0], SHAPE[1], 3

    def reference(self):
        raise FileNotFoundError("no absent images")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("refs") / "stub.npz"
    reference = stub_reference()
    save_statistics(path, reference.mu, reference.cov)
    return path


def settings(file, **changes):
    return {"extractor": Stub(), "reference": {"file": str(file), "url": "https://x/y.npz"}, **SETTINGS, **changes}


def test_a_run_is_measured_and_drawn_without_images(file, tmp_path):
    evaluation = Evaluation(settings(file), NoImages(), CPU, tmp_path)
    method = SimpleNamespace(sample=sampler, nfe=1, teacher=None, exported=dict)
    (record,) = evaluation.run(method, RunFolder(tmp_path / "run"), Weights("raw"))
    assert (record.subject, record.metric) == ("student", "fid_stub")
    assert record.fingerprint["reference"] == sha256(file.read_bytes()).hexdigest()
    seeds = torch.arange(30)
    rows = Stub()(to_uint8(sampler(sample_noise(seeds, SHAPE), sample_labels(seeds, 3))))
    gaussian, real = RunningGaussian(8).update(rows), stub_reference()
    expected = frechet_distance(gaussian.mean, gaussian.cov, real.mu, real.cov).item()
    assert record.values[0] == pytest.approx(expected, rel=1e-6)
    evaluation.pictures(tmp_path / "run", {"student": sampler})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["interpolation.png", "samples.png"]
    width, height = Image.open(tmp_path / "run/samples.png").size
    assert width < height, "two blocks of one column: no real images beside the samples"
    with pytest.raises(
        ValueError, match=r"flows are measured against the real images themselves: set .*reference=null"
    ):
        FlowMeasurement([], evaluation, samples=8, path_steps=2)


def test_without_a_reference_the_images_are_asked_for(file, tmp_path):
    for options in (settings(file, reference=None), {k: v for k, v in settings(file).items() if k != "reference"}):
        with pytest.raises(FileNotFoundError, match="no absent images"):
            Evaluation(options, NoImages(), CPU, tmp_path)


def test_what_does_not_fit_is_refused_before_training(file, tmp_path):
    for metric in ("kid", "precision", "w2"):
        with pytest.raises(ValueError, match=f"{metric} compare with .*or set evaluation.reference=null"):
            checked(settings(file, metrics=["fid", metric]), NoImages())
    message = (
        "no reference statistics at .*gone.npz; add download=true to fetch https://x/y.npz, or put the file there$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        checked(settings(tmp_path / "gone.npz"), NoImages())
    with pytest.raises(FileNotFoundError, match="gone.npz; put the file there$"):
        published_reference({"file": tmp_path / "gone.npz", "url": None}, Stub())
    for options in ({"url": "x"}, {"file": file, "sigma": 3}):
        with pytest.raises(ValueError, match=r"evaluation.reference has .*; give file=PATH.npz and at most url"):
            published_reference(options, Stub())
    right = sha256(file.read_bytes()).hexdigest()
    assert published_reference({"file": file, "sha256": right.upper()}, Stub()).hash == right
    with pytest.raises(OSError, match=f"has SHA-256 {right}, expected 00; fetch it again"):
        published_reference({"file": file, "sha256": "00"}, Stub())
    save_statistics(tmp_path / "other.npz", torch.zeros(2048), torch.eye(2048))
    with pytest.raises(
        ValueError, match="other.npz has 2048 features, the stub extractor 8; choose statistics made by"
    ):
        checked(settings(tmp_path / "other.npz"), NoImages())

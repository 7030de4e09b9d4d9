"""The benchmarks of packing and of features, and which parts run unless one is named; not how fast anything is."""

import numpy as np
import pytest
from PIL import Image
from test_benchmarks import assert_spread

from benchmarks import features, packing, run


def test_packing_is_measured_and_printed():
    result = packing.measure(count=20, jpegs=6, side=80, rounds=2)
    for key in ("zip_images_per_second", "jpeg_images_per_second"):
        assert_spread(result[key], 2)
    text = run.table(result)
    for words in (
        "20 PNGs of that size in a zip, 6 JPEGs of 80x80 in a folder",
        "PNGs in a zip ",
        "JPEGs in a folder ",
    ):
        assert words in text


def test_pictures_are_smooth_and_all_different(tmp_path):
    images = packing.pictures(5, 64)
    assert images.shape == (5, 64, 64, 3)
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    assert np.abs(np.diff(images.astype(int), axis=1)).mean() < 15  # of unrelated pixels: 85
    (first, *others) = sorted(packing.write_jpegs(tmp_path / "jpegs", images).iterdir())
    assert len(others) == 4
    assert np.abs(np.asarray(Image.open(first)).astype(int) - images[0]).mean() < 10


def test_features_are_measured_and_printed():
    result = features.measure(batches=(2,), side=8, rounds=1)
    (part,) = result["parts"]
    for key in ("features_images_per_second", "bf16_features_images_per_second", "bf16_over_float32"):
        assert_spread(part[key], 1)
    assert 0.001 < part["bf16_difference"] < 1
    assert "bfloat16 changes features by " in run.table(result)


@pytest.mark.parametrize(("arguments", "expected"), [([], ["quick"]), (["--only", "long"], ["long"])])
def test_a_long_part_runs_only_when_it_is_named(monkeypatch, arguments, expected):
    ran = []
    part = {"title": "t", "device": "cpu", "batch_size": 1}
    monkeypatch.setattr(run, "PARTS", {name: lambda name=name: ran.append(name) or part for name in ("quick", "long")})
    monkeypatch.setattr(run, "_WHEN_NAMED", {"long"})
    run.main(arguments)
    assert ran == expected

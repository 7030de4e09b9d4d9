"""Which pictures a data set has, and what the scatter plots of points show."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Digits, PlanePoints
from stillhouse.diffusion.interpolation import slerp
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.metrics.images import to_uint8
from stillhouse.pictures.grids import nearest_images
from stillhouse.pictures.points import PLANE, figure_pixels, plot_interpolations, plot_points
from stillhouse.pictures.samples import nearest_real, save_final_pictures, save_progress_picture

CPU = torch.device("cpu")


def planar(noise, labels):
    assert noise.shape[1:] == PLANE
    assert labels is None
    return noise.clamp(-0.9, 0.9)


def cloud(count=50, seed=0, low=-0.9, high=0.9):
    return torch.rand(count, *PLANE, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def coloured(picture):
    """Pixels that are neither grey nor white."""
    return int((np.ptp(picture.astype(int), axis=2) > 40).sum())


def offsets(axes):
    return [np.asarray(collection.get_offsets()) for collection in axes.collections]


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return PlanePoints("checkerboard", root=str(tmp_path_factory.mktemp("data")), batch_size=1, points=3000)


def test_real_points_lie_beneath_the_samples_of_every_panel():
    real, teacher, student = cloud(), cloud(30, 1), cloud(20, 2)
    student[:3, 1] = 5
    figure = plot_points({"teacher": teacher, "student": student}, real)
    one, other = figure.axes
    for axes, samples in ((one, teacher), (other, student)):
        beneath, above = offsets(axes)
        assert np.allclose(beneath, real.flatten(1))
        assert np.allclose(above, samples.flatten(1).clamp(max=1.13))
        assert axes.collections[0].zorder < axes.collections[1].zorder
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_aspect() == 1
    assert one.get_title() == "teacher"
    assert other.get_title() == "student\n(3 outside)"
    picture = figure_pixels(figure)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert coloured(picture[:, picture.shape[1] // 2 :]) > 20
    assert coloured(figure_pixels(plot_points({"none": student[:0]}, real))) == 0


def test_curves_are_the_samplers_images_of_great_circles():
    seeds = torch.arange(4).reshape(2, 2)
    samplers = {"teacher": lambda noise, labels: noise / 4, "student": lambda noise, labels: -noise / 4}
    figure = plot_interpolations(samplers, cloud(), seeds, num_classes=0, steps=20)
    z0, z1 = sample_noise(seeds[:, 0], PLANE), sample_noise(seeds[:, 1], PLANE)
    circles = slerp(z0, z1, torch.linspace(0, 1, 21)).flatten(2)
    for axes, sign in zip(figure.axes, (1, -1), strict=True):
        curves, ends = axes.lines[::2], axes.lines[1::2]
        for pair in range(2):
            expected = sign * circles[:, pair] / 4
            assert np.allclose(curves[pair].get_xydata(), expected)
            assert np.allclose(ends[pair].get_xydata(), expected[[0, -1]])
            assert curves[pair].get_color() == ends[pair].get_color()
        assert len(offsets(axes)) == 1, "real points"


def test_final_pictures_of_points(points, tmp_path):
    save_final_pictures(tmp_path, {"teacher": planar, "student": planar}, points, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interpolation.png", "samples.png"]
    before = (tmp_path / "samples.png").read_bytes()
    save_final_pictures(tmp_path, {"teacher": planar, "student": planar}, points, CPU)
    assert (tmp_path / "samples.png").read_bytes() == before


def test_a_picture_of_points_on_the_way(points, tmp_path):
    asked = []
    picture = save_progress_picture(
        tmp_path / "a" / "1.png", lambda *a: asked.append(a[0]) or planar(*a), points, CPU, rows=2, columns=3
    )
    assert torch.equal(asked[0], sample_noise(torch.arange(2000), PLANE))
    assert coloured(picture) > 100
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["1.png"]
    assert Image.open(tmp_path / "a" / "1.png").size[0] > 300


def test_the_nearest_real_image_is_sought_among_all_of_60000():
    class Clothes:
        def __len__(self):
            return 60_000

        def fetch(self, indices):
            return torch.from_numpy(indices % 200 + 55 * (indices == 59_999)).byte()[:, None, None, None], None

    assert nearest_real(Clothes(), torch.tensor([7, 255]).byte()[:, None, None, None]).flatten().tolist() == [7, 254]


def test_images_are_shown_as_images(tmp_path, monkeypatch):
    digits = Digits(root=str(tmp_path / "data"), batch_size=1)
    seen = []

    def sample(noise, labels):
        seen.append((len(noise), labels))
        return noise.clamp(-1, 1)

    save_final_pictures(tmp_path, {"student": sample}, digits, CPU)
    assert (tmp_path / "samples.png").is_file()
    assert seen[0][0] == 16
    assert seen[0][1].tolist() == [*range(10), *range(6)], "every class once"
    packed, images = digits.reference(), to_uint8(sample(sample_noise(torch.arange(16), (1, 8, 8)), None))
    real = packed.fetch(np.arange(len(packed)))[0]
    monkeypatch.setattr("stillhouse.pictures.samples._AT_ONCE", 500)
    assert torch.equal(nearest_real(packed, images), real[nearest_images(images, real)])
    picture = save_progress_picture(tmp_path / "grid.png", sample, digits, CPU, rows=2, columns=3)
    assert picture.shape == (64, 96, 3)

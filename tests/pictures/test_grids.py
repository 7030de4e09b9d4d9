import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.diffusion.interpolation import slerp
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.metrics.images import to_uint8
from stillhouse.pictures.grids import image_grid, nearest_images, save_grid, save_interpolations, save_side_by_side


def random_images(count, channels=1, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def find(picture, image, scale):
    """Top left corners at which the enlarged image stands in the picture."""
    pixels = image[0].numpy().repeat(scale, 0).repeat(scale, 1)
    windows = np.lib.stride_tricks.sliding_window_view(picture[:, :, 0], pixels.shape)
    return [tuple(map(int, corner)) for corner in np.argwhere((windows == pixels).all(axis=(2, 3)))]


def test_grid_places_images_row_by_row():
    images = random_images(5, channels=3)
    grid = image_grid(images, 2)
    assert grid.shape == (12, 8, 3)
    assert grid.dtype == np.uint8
    assert np.array_equal(grid[4:8, 4:8], images[3].permute(1, 2, 0).numpy())
    assert (grid[8:, 4:] == 255).all()


def test_grid_enlarges_pixels_and_separates_images():
    images = random_images(4)
    grid = image_grid(images, 2, scale=3, gap=2)
    assert grid.shape == (26, 26, 3)
    assert (grid[12:14] == 255).all()
    assert (grid[:, 12:14] == 255).all()
    assert np.array_equal(grid[14:26:3, :12:3, 1], images[2, 0].numpy())
    assert (grid[14:17, :3] == images[2, 0, 0, 0].item()).all()
    with pytest.raises(ValueError, match=r"uint8 images \(N, 1 or 3, H, W\), got torch\.float32 \(2, 1, 4, 4\)"):
        image_grid(torch.zeros(2, 1, 4, 4), 2)


def test_saved_grid_holds_the_images(tmp_path):
    images = random_images(6)
    save_grid(tmp_path / "samples" / "grid.png", images, 3, scale=4)
    picture = read(tmp_path / "samples" / "grid.png")
    corners = [find(picture, image, 4) for image in images]
    assert all(len(found) == 1 for found in corners)
    assert [c[0][0] for c in corners[:3]] == [corners[0][0][0]] * 3
    assert corners[3][0][0] > corners[0][0][0]
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["grid.png"]


def test_side_by_side_keeps_a_noise_in_one_row_under_its_titles(tmp_path):
    teacher, student, real = (random_images(5, seed=seed) for seed in range(3))
    path = tmp_path / "samples.png"
    save_side_by_side(path, {"teacher": teacher, "student": student, "nearest real image": real}, scale=6, rows=3)
    picture = read(path)
    corners = [[find(picture, images[i], 6) for images in (teacher, student, real)] for i in range(5)]
    assert all(len(found) == 1 for row in corners for found in row)
    tops = [[found[0][0] for found in row] for row in corners]
    lefts = [[found[0][1] for found in row] for row in corners]
    assert all(len(set(row)) == 1 for row in tops)
    assert lefts[0] == lefts[1] == lefts[2]
    assert lefts[0] == sorted(lefts[0])
    assert tops[3] == tops[0], "the fourth noise begins a new block"
    assert lefts[3][0] > lefts[0][2]
    above = picture[: tops[0][0]]
    assert (above < 100).any(), "titles are written"
    with pytest.raises(ValueError, match="equally many images, got teacher 5, student 4"):
        save_side_by_side(path, {"teacher": teacher, "student": student[:4]})


@pytest.mark.parametrize("chunk", [1 << 28, 2000])
def test_nearest_matches_brute_force_whatever_the_chunks(chunk):
    images, candidates = random_images(7, 3, seed=1), random_images(50, 3, seed=2)
    expected = (images[:, None].double() - candidates[None].double()).square().flatten(2).sum(dim=2).argmin(dim=1)
    assert torch.equal(nearest_images(images, candidates, chunk), expected)
    assert nearest_images(candidates[[31, 4]], candidates, chunk).tolist() == [31, 4]
    assert nearest_images(candidates[[5]], candidates[[5, 5, 5]].flip(0), chunk).tolist() == [0]


def test_interpolation_strip_shows_each_sampler_on_the_same_path(tmp_path):
    seen = []

    def teacher(noise, labels):
        seen.append((noise, labels))
        return noise * 0.3

    seeds = torch.tensor([[3, 4], [5, 6]])
    path = tmp_path / "interpolation.png"
    samplers = {"teacher": teacher, "student": lambda noise, labels: noise * -0.3}
    save_interpolations(path, samplers, seeds, shape=(1, 4, 4), num_classes=10, scale=5)
    (noise, labels), picture = seen[0], read(path)
    z0, z1 = sample_noise(seeds[:, 0], (1, 4, 4)), sample_noise(seeds[:, 1], (1, 4, 4))
    torch.testing.assert_close(noise[[0, 11]], z0)
    torch.testing.assert_close(noise[[10, 21]], z1)
    torch.testing.assert_close(noise[3], slerp(z0[:1], z1[:1], torch.tensor([0.3]))[0, 0])
    assert torch.equal(labels, sample_labels(seeds[:, 0], 10).repeat_interleave(11))
    corners = {}
    for sign in (1, -1):
        images = to_uint8(noise * 0.3 * sign)
        corners[sign] = [find(picture, image, 5) for image in images]
        assert all(len(found) == 1 for found in corners[sign])
    first = corners[1][0][0]
    assert all(found[0][0] == first[0] for found in corners[1][:11])
    assert corners[-1][0][0][1] == first[1], "the student's row begins under the teacher's"
    assert first[0] < corners[-1][0][0][0] < corners[1][11][0][0]

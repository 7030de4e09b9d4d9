import copy

import pytest
import pytorch_lightning as pl
import torch
from vgg_file import write_vgg16

from stillhouse.checkpoints.lpips import load_lpips
from stillhouse.diffusion.distance import DISTANCES, Distance
from stillhouse.diffusion.losses import regression

RGB = (3, 32, 32)
GENERATOR = torch.Generator().manual_seed(3)
TARGET = torch.rand(2, *RGB, generator=GENERATOR) * 2 - 1
OUTPUT = TARGET + 0.3 * torch.randn(TARGET.shape, generator=GENERATOR)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_vgg16(tmp_path_factory.mktemp("vgg") / "vgg16.pth")


@pytest.fixture(scope="module")
def distances(weights):
    return {loss: Distance(loss, RGB, weights) for loss in DISTANCES}


def test_values(distances, weights):
    lpips = load_lpips(weights)(OUTPUT, TARGET)
    expected = {loss: regression(OUTPUT, TARGET, loss) for loss in ("l2", "l1", "huber")}
    expected |= {"lpips": lpips, "lpips+l2": lpips + (OUTPUT - TARGET).square().mean((1, 2, 3))}
    for loss in DISTANCES:
        torch.testing.assert_close(distances[loss](OUTPUT, TARGET), expected[loss])


@pytest.mark.parametrize("loss", DISTANCES)
def test_a_loss_per_sample_in_float32_with_a_gradient(distances, loss):
    distance = distances[loss]
    assert distance.to("cpu") is distance
    output = OUTPUT.double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = distance(output, TARGET.double())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, distance(OUTPUT, TARGET))
    values.sum().backward()
    assert output.grad.flatten(1).any(1).all()
    assert output.grad.isfinite().all()
    assert not distance(TARGET, TARGET).any()


def test_a_module_that_holds_it_has_none_of_its_weights(distances):
    class Method(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = torch.nn.Linear(2, 2)
            self.distance = distances["lpips"]

    method = Method()
    assert [name for name, _ in method.named_parameters()] == ["student.weight", "student.bias"]
    assert list(method.state_dict()) == ["student.weight", "student.bias"]
    assert not list(method.buffers())
    assert copy.deepcopy(method).distance is method.distance


def test_lpips_can_enlarge_images(weights):
    distance = Distance("lpips", RGB, weights, lpips_resize=48)
    torch.testing.assert_close(distance(OUTPUT, TARGET), load_lpips(weights, resize=48)(OUTPUT, TARGET))


def test_small_grey_images_have_the_distances_of_pixels_alone():
    images = torch.zeros(2, 1, 8, 8)
    for loss in ("l2", "l1", "huber"):
        assert Distance(loss, (1, 8, 8))(images, images).tolist() == [0, 0]
    message = r"^LPIPS is for RGB images of at least 32x32, this data has 1x8x8; choose another method.loss$"
    for loss in ("lpips", "lpips+l2"):
        with pytest.raises(ValueError, match=message):
            Distance(loss, (1, 8, 8))


@pytest.mark.parametrize("loss", ["mse", "L2", "", None, "lpips+l1"])
def test_another_loss_is_refused(loss):
    with pytest.raises(ValueError, match=r"^method.loss must be one of l2, l1, huber, lpips, lpips\+l2, got "):
        Distance(loss, RGB)


def test_missing_weights_are_named_with_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no VGG-16 weights at .*gone.pth; .* by method.lpips_weights$"):
        Distance("lpips", RGB, tmp_path / "gone.pth")

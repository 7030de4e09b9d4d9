"""EDM's augmentation of training images, against EDM's own code and against what each change means."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy import stats

from datamodules.components.augmentation import LABELS, Augmentation, augmented, check_augment, draw
from launch.run.names import register_resolvers
from stillhouse.networks import MLP, SongUNet

ROOT = Path(__file__).parents[2]
# What AugmentPipe(p=1, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1) of NVlabs/edm 008a4e5,
# training/augment.py, drew after torch.manual_seed(11), and made of the images of `pattern`.
EDM_DRAWS = {
    "mirror": [1, 1, 0, 1],
    "flip": [1, 1, 0, 0],
    "zoom": [0.450418, -0.956833, 1.501188, -0.313574],
    "rotation": [-1.494306, 0.817259, 2.371952, -2.119809],
    "stretch": [0.892882, -0.489056, -1.447021, 1.194070],
    "axis": [-1.734970, 0.401450, 0.706815, 0],
    "right": [1.389576, 0.172807, -0.983504, -1.093710],
    "down": [0.131824, 0.194278, -0.338993, 1.659406],
}
EDM_LABELS = [
    [1, 1, 0.450418, -0.923584, -0.997076, -0.145930, -0.880876, 1.389576, 0.131824],
    [1, 1, -0.956833, -0.315777, 0.729273, -0.450174, -0.191100, 0.172807, 0.194278],
    [0, 0, 1.501188, -1.718161, 0.695877, -1.100364, -0.939717, -0.983504, -0.338993],
    [1, 0, -0.313574, -1.521845, -0.853040, 1.194070, 0, -1.093710, 1.659406],
]
EDM_ROWS = [  # rows 0 and 5 of each image
    [
        [-0.530890, -0.004306, -0.448533, -0.179326, -0.633120, 0.353533, -0.302801, -0.303397],
        [0.441942, -0.062869, 0.518805, -0.431015, 0.756487, 0.109976, 0.150489, -0.088485],
    ],
    [
        [0.039242, -0.032581, 0.236374, -0.102128, 0.144810, 0.134814, -0.234950, -0.002836],
        [0.331330, -0.336680, 0.184617, -0.549073, -0.107800, -0.096912, -0.131226, 0.369295],
    ],
    [
        [-0.917053, -0.704611, -0.190361, -0.018461, 0.014962, 0.166428, 0.700843, 0.050791],
        [-0.256049, -0.437190, -0.435501, 0.058382, 0.180841, 0.601501, 0.781924, 0.023463],
    ],
    [
        [0.176564, -0.342873, -0.132265, 0.210363, 0.092747, -0.729789, 0.046275, 0.024542],
        [0.115018, 0.136796, -0.036618, -0.121759, -0.302104, -0.497540, 0.412421, 0.071834],
    ],
]


def pattern(count: int = 4, channels: int = 1) -> torch.Tensor:
    """(count, channels, 8, 8), in [-1, 1], with all frequencies in it."""
    numbers = 7 * torch.arange(channels * 64).reshape(1, channels, 8, 8) + 5 * torch.arange(count).view(-1, 1, 1, 1)
    return (numbers % 23) / 11 - 1


def change(**values: float) -> Augmentation:
    """One image's."""
    return Augmentation(
        **{field.name: torch.tensor([float(values.get(field.name, 0))]) for field in fields(Augmentation)}
    )


def test_it_is_edms():
    changes = Augmentation(**{name: torch.tensor(values).float() for name, values in EDM_DRAWS.items()})
    torch.testing.assert_close(changes.labels, torch.tensor(EDM_LABELS), rtol=0, atol=2e-6)
    result = changes.apply(pattern())
    torch.testing.assert_close(result[:, 0, [0, 5]], torch.tensor(EDM_ROWS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mirror": 1}, lambda x: x.flip(3)),
        ({"flip": 1}, lambda x: x.flip(2)),
        ({"mirror": 1, "flip": 1}, lambda x: x.rot90(2, (2, 3))),
        ({}, lambda x: x),
    ],
)
def test_exchanges_are_exact(values, expected):
    images = pattern(1, 3)
    assert torch.equal(change(**values).apply(images), expected(images))


def test_a_shift_of_whole_pixels_is_exact_and_brings_in_the_reflection():
    images = pattern(1, 3)
    moved = change(right=2, down=-1).apply(images)  # an eighth is one pixel
    columns, rows = torch.tensor([2, 1, 0, 1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 4, 5, 6, 7, 6])
    torch.testing.assert_close(moved, images[:, :, rows][..., columns], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "source"),
    [  # where the pixel at (x, y), y down, of the result was, from the middle
        ({"right": 0.3, "down": -0.7}, lambda x, y: (x - 0.3 * 4, y + 0.7 * 4)),
        ({"rotation": torch.pi / 2}, lambda x, y: (-y, x)),
        ({"zoom": 5}, lambda x, y: (x / 2, y / 2)),
        ({"stretch": 5}, lambda x, y: (x / 2, y * 2)),
        ({"stretch": -5}, lambda x, y: (x * 2, y / 2)),
        ({"stretch": 5, "axis": torch.pi / 2}, lambda x, y: (x * 2, y / 2)),
        ({"stretch": 5, "right": 1}, lambda x, y: ((x - 4) / 2, y * 2)),
        ({"rotation": torch.pi / 2, "right": 1}, lambda x, y: (-y, x - 4)),
    ],
)
def test_what_each_change_does(values, source):
    """Slopes of brightness, whose value says where a pixel came from: to an eighth of a pixel, as the filter is not symmetric."""
    y, x = torch.meshgrid(*[torch.arange(32) - 15.5] * 2, indexing="ij")
    inner = slice(14, 18)  # reflections are far
    for slope in (x, y):
        moved = change(**values).apply(slope[None, None] / 32)[0, 0, inner, inner] * 32
        place = source(x, y)[0 if slope is x else 1][inner, inner]
        torch.testing.assert_close(moved, place.float(), rtol=0, atol=1 / 8)


def test_beyond_the_reflection_is_black():
    small = change(zoom=-15).apply(torch.ones(1, 1, 32, 32))[0, 0]  # an eighth as large: 12 pixels with the reflection
    assert small[:, :4].abs().max() < 0.01
    torch.testing.assert_close(small[13:19, 13:19], torch.ones(6, 6), rtol=0, atol=0.01)


def test_images_whose_labels_are_zero_are_as_they_were_and_no_others():
    images = pattern(400)
    batch = {"image": images, "label": torch.arange(400), "position": torch.arange(1000, 1400)}
    result = augmented(batch, 0.1, seed=3)
    assert set(result) == {"image", "label", "position", "augment"}
    same = (result["image"] == images).flatten(1).all(1)
    assert torch.equal(same, (result["augment"] == 0).all(1))
    assert 80 < same.sum() < 160  # half of 0.95 * 0.9^4 of them
    mirrored = (result["augment"][:, 0] == 1) & (result["augment"][:, 1:] == 0).all(1)
    assert torch.equal(result["image"][mirrored], images[mirrored].flip(3))
    assert augmented(batch, None, seed=3) is batch


def test_an_image_depends_on_seed_and_position_alone():
    images, positions = pattern(16), torch.arange(1 << 33, (1 << 33) + 16)
    state = torch.get_rng_state()
    whole = augmented({"image": images, "position": positions}, 0.5, seed=1)
    part = augmented({"image": images[5:9], "position": positions[5:9]}, 0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(part["augment"], whole["augment"][5:9])
    torch.testing.assert_close(part["image"], whole["image"][5:9], rtol=0, atol=1e-5)
    other = augmented({"image": images, "position": positions}, 0.5, seed=2)
    assert not torch.equal(other["augment"], whole["augment"])


def test_its_distribution_is_edms():
    count, p = 40_000, 0.3
    changes = draw(p, 0, torch.arange(count))
    assert all(getattr(changes, field.name).dtype == torch.float32 for field in fields(changes))
    given = {name: getattr(changes, name) != 0 for name in ("mirror", "flip", "zoom", "rotation", "stretch", "right")}
    shares = {"mirror": 0.5, "flip": p / 2, "zoom": p, "rotation": p, "stretch": p, "right": p}
    error = 5 * 0.5 / count**0.5
    for name, share in shares.items():
        assert given[name].float().mean().item() == pytest.approx(share, abs=error)
        for other in shares:
            if other != name:
                both = (given[name] & given[other]).float().mean().item()
                assert both == pytest.approx(share * shares[other], abs=error)
    assert torch.equal(given["right"], changes.down != 0)
    for name in ("zoom", "stretch", "right", "down"):
        values = getattr(changes, name)
        assert stats.kstest(values[values != 0].numpy(), "norm").pvalue > 0.001
    turns = changes.rotation[given["rotation"]].numpy() / torch.pi
    assert stats.kstest(turns, stats.uniform(-1, 2).cdf).pvalue > 0.001
    tilted = changes.axis != 0
    assert tilted.float().mean().item() == pytest.approx(0.5, abs=error)
    assert stats.kstest(changes.axis[tilted].numpy() / torch.pi, stats.uniform(-1, 2).cdf).pvalue > 0.001


def test_half_precision_around_it_changes_nothing():
    batch = {"image": pattern(8), "position": torch.arange(8)}
    expected = augmented(batch, 1.0, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        result = augmented(batch, 1.0, seed=0)
    assert torch.equal(result["image"], expected["image"])
    assert torch.equal(result["augment"], expected["augment"])


@pytest.mark.parametrize(("data", "augment"), [("cifar10", 0.12), ("ffhq64", 0.15), ("imagenet64", None)])
def test_edms_recipes_mirror_images_once_and_measure_seldom(data, augment):
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"data={data}", "method=pretrain"])
    assert cfg.method.augment == augment
    assert cfg.data.flip is False
    assert cfg.teacher.network.augment_dim == (LABELS if augment else 0)
    # An image of the training is three evaluations, forward and backward.
    measured = cfg.evaluation.training.num_samples * {"cifar10": 35, "ffhq64": 79, "imagenet64": 511}[data]
    assert measured < 0.1 * 3000 * cfg.evaluation.training.every_kimg


@pytest.mark.parametrize("value", [0, 1.5])
def test_what_is_no_probability_is_refused(value):
    network = SongUNet(8, 1, 1, augment_dim=9, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    with pytest.raises(ValueError, match=r"method.augment must be null or a probability in \(0, 1\], got "):
        check_augment(value, network)


@pytest.mark.parametrize(
    "network",
    [SongUNet(8, 1, 1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()), MLP(1, 2, 2, width=4)],
    ids=["SongUNet", "MLP"],
)
def test_a_network_that_could_not_be_told_is_refused(network):
    check_augment(None, network)
    choose = "set that" if isinstance(network, SongUNet) else "take a teacher with such a network"
    found = f"got a {type(network).__name__} with 0: {choose}"
    with pytest.raises(ValueError, match=f"needs a .* with teacher.network.augment_dim=9, {found}"):
        check_augment(0.12, network)

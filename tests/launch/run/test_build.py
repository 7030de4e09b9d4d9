"""What is built: random weights are a function of the seed alone, and parts that do not fit each other are refused."""

import pytest
import torch
from method_runs import config
from omegaconf import OmegaConf

from launch.run.build import build, build_seeded, check_fit


def same(ours, theirs):
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_random_weights_come_from_the_seed_alone():
    node = OmegaConf.create(
        {"_target_": "stillhouse.networks.MLP", "resolution": 1, "in_channels": 2, "out_channels": 2, "width": 8}
    )
    first = build_seeded(node, 3).state_dict()
    torch.manual_seed(1)  # another process begins in another state
    assert same(build_seeded(node, 3).state_dict(), first)
    assert not same(build_seeded(node, 4).state_dict(), first)
    with pytest.raises(ValueError, match=r"^seed=4294967296 is too large for numpy; choose one from 0 to 4294967295$"):
        build_seeded(node, 1 << 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher.network.resolution": 4},
            "the network has resolution=4, the data digits 8: choose a teacher that fits the",
        ),
        ({"teacher.network.in_channels": 3}, "the network has channels=3, the data digits 1: choose a teacher"),
        ({"teacher.network.num_classes": 5}, "the network has num_classes=5, the data digits 10: choose a teacher"),
        ({"teacher.conditional": False}, "the network has num_classes in use=0, the data digits 10: choose a teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_the_data_is_refused(changes, message):
    cfg = config("denoising_student", changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_fit(build(cfg.method), build(cfg.data))

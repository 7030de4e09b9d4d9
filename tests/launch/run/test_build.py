"""Random weights are a function of the seed alone."""

import torch
from omegaconf import OmegaConf

from launch.run.build import build_seeded


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

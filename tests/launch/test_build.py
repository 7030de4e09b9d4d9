"""Random weights are a function of the seed alone."""

import torch
from omegaconf import OmegaConf

from launch.build import build_seeded


def test_random_weights_come_from_the_seed_alone():
    node = OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 4})
    first = build_seeded(node, 3).weight
    torch.manual_seed(1)  # another process begins in another state
    assert torch.equal(build_seeded(node, 3).weight, first)
    assert not torch.equal(build_seeded(node, 4).weight, first)

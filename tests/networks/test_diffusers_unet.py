import subprocess
import sys

import pytest
import torch
from network_tools import inputs, tiny

from stillhouse.networks import DiffusersUNet


@pytest.mark.parametrize(
    ("resolution", "channel_mult", "count"),
    [
        (32, (1, 2, 2, 2), 35_746_307),
        (64, (1, 2, 2, 2, 4), 78_700_803),
        (256, (1, 1, 2, 2, 4, 4), 113_673_219),
    ],
)
def test_parameter_counts_of_the_published_networks(resolution, channel_mult, count):
    """35.7 and 113.7 million (DDPM, arXiv 2006.11239, appendix B), 78.7 million (DDIM's CelebA)."""
    with torch.device("meta"):
        network = DiffusersUNet(resolution, 3, 3, channel_mult=channel_mult)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    "options", [{}, {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-5}]
)
def test_output_is_that_of_diffusers(options):
    from diffusers import UNet2DModel

    network = tiny("ddpm", **options)
    names = {"embed.layer1": "time_embedding.linear_1", "embed.layer2": "time_embedding.linear_2"}
    state = {}
    for name, value in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        state[f"{names.get(layer, layer)}.{leaf}"] = value
    theirs = UNet2DModel(**network.config).eval()
    theirs.load_state_dict(state)
    given = inputs(network)
    with torch.no_grad():
        torch.testing.assert_close(network(*given), theirs(*given).sample, rtol=0, atol=1e-5)
        assert network(*given).std() > 0.1


def test_the_networks_are_there_without_waiting_for_diffusers():
    code = "import stillhouse.networks, sys; raise SystemExit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

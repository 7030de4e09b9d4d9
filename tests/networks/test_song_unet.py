import pytest
import torch
from network_tools import NCSNPP, SKIP, fill, noise

from stillhouse.networks import SongUNet

VARIANTS = {"ddpmpp": {}, "ncsnpp": NCSNPP, "skip": SKIP}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("ddpmpp", [0.90034, -0.45341, -0.77453, 0.28758, 0.88577, -0.62383, 0.20677, -0.03294]),
        ("ncsnpp", [0.74284, -0.02597, -0.28457, 0.40551, 0.55213, 0.1853, 0.09918, 0.24621]),
        ("skip", [0.7062, -0.43549, -0.65992, 0.68337, 0.90551, -0.09382, -0.25488, 0.31334]),
    ],
)
def test_output_is_that_of_edms_own_network(variant, expected):
    """`expected`: 8 output pixels of NVlabs/edm's SongUNet (commit 008a4e5) given the same weights and inputs."""
    options = {"num_classes": 4, "augment_dim": 9, "model_channels": 16, "channel_mult": (1, 2, 2), "num_blocks": 1}
    network = SongUNet(16, 3, 3, **options, attn_resolutions=(8,), **VARIANTS[variant]).eval()
    fill(network)
    with torch.no_grad():
        out = network(noise(1, 2, 3, 16, 16), torch.tensor([-1.0, 0.5]), torch.tensor([3, 1]), noise(2, 2, 9))
    pixels = out.flatten(1)[:, [0, 17, 391, 767]].flatten()
    torch.testing.assert_close(pixels, torch.tensor(expected), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("variant", "resolution", "channel_mult", "num_classes", "count"),
    [
        ("ddpmpp", 32, (2, 2, 2), 0, 55_733_891),
        ("ddpmpp", 32, (2, 2, 2), 10, 55_735_299),
        ("ddpmpp", 64, (1, 2, 2, 2), 0, 61_805_571),
        ("ncsnpp", 32, (2, 2, 2), 0, 56_397_827),
        ("ncsnpp", 32, (2, 2, 2), 10, 56_400_643),
        ("ncsnpp", 64, (1, 2, 2, 2), 0, 62_761_091),
    ],
)
def test_parameter_counts_of_the_published_networks(variant, resolution, channel_mult, num_classes, count):
    options = {"num_classes": num_classes, "channel_mult": channel_mult, "augment_dim": 9, **VARIANTS[variant]}
    with torch.device("meta"):
        network = SongUNet(resolution, 3, 3, **options)
    assert sum(p.numel() for p in network.parameters()) == count

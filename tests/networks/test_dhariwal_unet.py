import torch
from network_tools import NETWORKS, fill, inputs, noise

from stillhouse.networks import DhariwalUNet


def test_output_is_that_of_edms_own_network():
    """`expected`: 8 output pixels of NVlabs/edm's DhariwalUNet (commit 008a4e5) given the same weights and inputs."""
    options = {"num_classes": 4, "augment_dim": 9, "model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1}
    network = DhariwalUNet(16, 3, 3, **options, attn_resolutions=(16,)).eval()
    fill(network)
    with torch.no_grad():
        out = network(noise(1, 2, 3, 16, 16), torch.tensor([-1.0, 0.5]), torch.tensor([3, 1]), noise(2, 2, 9))
    pixels = out.flatten(1)[:, [0, 17, 391, 767]].flatten()
    torch.testing.assert_close(
        pixels,
        torch.tensor([-0.50916, -0.61337, -1.63373, 0.43777, -0.53393, 0.2814, -0.88605, 0.36495]),
        rtol=0,
        atol=3e-5,
    )


def test_parameter_count_of_the_published_network():
    with torch.device("meta"):
        network = DhariwalUNet(64, 3, 3, num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 295_899_267
    assert (network.encoder_channels, network.encoder_resolution) == (768, 8)


def test_starts_as_zero_with_every_block_the_identity():
    torch.manual_seed(0)
    made, options = NETWORKS["adm"]
    network = made(**options).eval()
    assert not network(*inputs(network)).any()
    block = network.decoder["4"].entry[0]
    features = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(features, torch.randn(2, 64)), features)

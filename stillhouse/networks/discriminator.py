"""DMD2's classifier of real and generated images, on the encoder's features of a U-Net."""

from torch import Tensor, nn

from stillhouse.networks.layers import conv, group_norm


class Discriminator(nn.Module):
    """A classifier with logits (B, 1) of encoder features (B, D, h, w), after the released ImageNet-64 code (there from 8x8).

    Convolutions halve the resolution down to 4; one over what is left and a linear layer follow (arXiv 2405.14867).

    Args:
        unet: the network whose `encode` gives the features; h = w = 4 * 2^k, or less than 4.

    Raises:
        ValueError: for another resolution of the features.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        channels, size = unet.encoder_channels, unet.encoder_resolution
        layers: list[nn.Module] = []
        while size > 4:
            if size % 2:
                raise ValueError(f"the discriminator halves the encoder's resolution to 4, {size} can't be halved")
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
            size //= 2
        layers += [nn.Conv2d(channels, channels, size), group_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, conv(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1).float()

"""The contract of the networks that a `Denoiser` reads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from stillhouse.checks import check_counts, check_inputs


class Network(nn.Module):
    """Base of the networks: an encoder and a decoder, both with one embedding of noise level, class and augmentation.

    A subclass has the encoder and the decoder as `_encode` and `_decode`, and sets the attributes below.

    Args:
        resolution: of the images, which are square.
        in_channels: of the input.
        out_channels: of the output.

    Attributes:
        embed: the embedding, of noise labels, class labels and augmentation labels; it has a linear layer `layer1`, from waves
            to its width.
        num_classes: 0 without labels.
        augment_dim: of the augmentation's labels, 0 without.
        encoder_channels: of the features at the end of the encoder.
        encoder_resolution: of these features.

    Raises:
        ValueError: for options that are not positive integers.
    """

    embed: nn.Module
    num_classes: int = 0  # not set below: which attributes a network has of its own enters the hash of its form
    augment_dim: int = 0
    encoder_channels: int
    encoder_resolution: int

    def __init__(self, resolution: int, in_channels: int, out_channels: int):
        super().__init__()
        check_counts(resolution=resolution, in_channels=in_channels, out_channels=out_channels)
        self.resolution = resolution
        self.in_channels = in_channels
        self.out_channels = out_channels

    @property
    def two_times(self) -> bool:
        """Whether it is conditioned on a second time (`stillhouse/networks/second_time.py`)."""
        return hasattr(self.embed, "second_time")

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        encoded: bool = False,
        both: bool = False,
        span: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Evaluate the network.

        Args:
            x: the network's input (B, in_channels, resolution, resolution).
            noise_labels: the preconditioning's c_noise (B,).
            class_labels: int64 (B,) in [0, num_classes); None is the zero vector.
            augment_labels: (B, augment_dim); None is the zero vector.
            encoded: whether to stop at the end of the encoder.
            both: whether to give the features beside the output.
            span: from the time of the input to a second one (B,), of a network of `two_times`, and of no other.

        Returns:
            The output (B, out_channels, resolution, resolution); where `encoded`, the features that `encode` gives; of `both`
            a pair.

        Raises:
            ValueError: for other inputs, labels where there are no classes, and a span where there is one time or the reverse.
        """
        check_inputs(self, x, noise_labels, class_labels, augment_labels, span)
        emb = self.embed(noise_labels, class_labels, augment_labels, span)
        features = self._encode(x, emb)
        if encoded:
            return features[-1]
        encoder_end = features[-1]  # of a list that a decoder takes its features from
        output = self._decode(features, emb)
        return (output, encoder_end) if both else output

    def encode(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Compute the features at the end of the encoder, which a discriminator reads; arguments as of `forward`.

        Returns:
            (B, encoder_channels, encoder_resolution, encoder_resolution).
        """
        return self(x, noise_labels, class_labels, encoded=True)  # a call, which is what torch compiles

    def _encode(self, x: Tensor, emb: Tensor) -> Sequence[Tensor]:
        """Compute the features that the decoder reads, the last of them those at the end of the encoder."""
        raise NotImplementedError

    def _decode(self, features: Sequence[Tensor], emb: Tensor) -> Tensor:
        raise NotImplementedError


def autocast_weights(network: Network) -> Iterator[nn.Parameter]:
    """List the weights that autocast rounds: those of convolutions and matrix products outside of the embedding."""
    exact = set(network.embed.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in exact:
            yield from module.parameters(recurse=False)


@contextmanager
def weights_frozen(*networks: nn.Module) -> Iterator[None]:
    """Take gradients by inputs alone within the block: a compiled backward pass would compute those by the weights too."""
    weights = [p for network in networks for p in network.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)

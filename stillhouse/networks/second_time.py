"""One network for any two times of a flow: what lies between them is one more condition (MeanFlow, arXiv 2505.13447)."""

import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.networks.embeddings import PositionalEmbedding
from stillhouse.networks.layers import linear, zeroed


class SpanEmbedding(nn.Module):
    """Spans of time (B,) in [0, 1] as vectors (B, emb_channels), which start at zero: sines and cosines, two linear layers.

    Args:
        channels: of the waves.
        emb_channels: of the vectors.
    """

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.waves = PositionalEmbedding(channels)
        self.layer1 = linear(channels, emb_channels)
        self.layer2 = zeroed(linear(emb_channels, emb_channels))

    def forward(self, span: Tensor) -> Tensor:
        return self.layer2(F.silu(self.layer1(self.waves(span).to(self.layer1.weight.dtype))))


def condition_on_second_time(network: nn.Module) -> None:
    """Condition a network on the span from its time to a second one, in place: `two_times` is true from then on.

    Its output stays the same until its new parameters are trained; optimisers and averages come after this.

    Args:
        network: with an `embed` of this room.

    Raises:
        ValueError: for a network without `embed`, or one that is conditioned already.
    """
    embed = getattr(network, "embed", None)
    if embed is None:
        raise ValueError(f"{type(network).__name__} has no embedding of the noise level that a second time could join")
    if network.two_times:
        raise ValueError("the network knows a second time already")
    like = embed.layer1.weight
    embed.second_time = SpanEmbedding(like.shape[1], like.shape[0]).to(like.device, like.dtype)

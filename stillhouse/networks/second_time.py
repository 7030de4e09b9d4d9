"""One network for any two times of a flow: what lies between them is one more condition (MeanFlow, arXiv 2505.13447)."""

from torch import nn

from stillhouse.networks.embeddings import NumberEmbedding


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
    embed.second_time = NumberEmbedding(like.shape[1], like.shape[0]).to(like.device, like.dtype)

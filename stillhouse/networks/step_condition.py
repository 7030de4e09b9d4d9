"""One network for several numbers of sampling steps, conditioned on their number (SFD-v, arXiv 2409.19681)."""

import torch
from torch import Tensor, nn

from stillhouse.checks import check_counts
from stillhouse.networks.branching import plain_state
from stillhouse.networks.embeddings import NumberEmbedding


class StepEmbedding(NumberEmbedding):
    """The number of steps as a vector (1, emb_channels).

    The number is a buffer that is filled in place: setting it makes no transfer and no recompilation. It is the same for
    a whole batch and, under DDP, on all processes.

    Args:
        channels: of the waves.
        emb_channels: of the vector.
        count: the number of steps until `set_steps`.
    """

    def __init__(self, channels: int, emb_channels: int, count: int):
        super().__init__(channels, emb_channels)
        self.register_buffer("count", torch.tensor([float(count)]), persistent=False)

    def forward(self, count: Tensor | None = None) -> Tensor:
        return super().forward(self.count if count is None else count)


def condition_on_steps(network: nn.Module, count: int) -> None:
    """Condition a network on its number of sampling steps, in place.

    Its output stays the same until its new parameters are trained; optimisers and averages come after this.

    Args:
        network: with an `embed` of this room.
        count: the number of steps until `set_steps`.

    Raises:
        ValueError: for count < 1, a network without `embed` or with one that ends without a bias, or one that is conditioned
            already.
    """
    check_counts(count=count)
    embed = getattr(network, "embed", None)
    if embed is None:
        raise ValueError(
            f"{type(network).__name__} has no embedding of the noise level that a number of steps could join"
        )
    if getattr(getattr(embed, "layer2", None), "bias", None) is None:
        raise ValueError(
            f"{type(network).__name__} has no bias in its embedding that could take up a number of steps: train it for one number"
        )
    if embed.steps is not None:
        raise ValueError("the network knows its number of steps already; set_steps changes it")
    like = embed.layer1.weight
    embed.steps = StepEmbedding(like.shape[1], like.shape[0], count).to(like.device, like.dtype)


def set_steps(network: nn.Module, count: int) -> None:
    """Make the network's evaluations those of sampling in `count` steps, until the next call.

    Raises:
        ValueError: for count < 1 or a network that is not conditioned.
    """
    check_counts(count=count)
    _steps(network).count.fill_(count)


@torch.no_grad()
def fixed_steps_state(network: nn.Module, count: int) -> dict[str, Tensor]:
    """Take the state dict of the plain network, without condition or branches, that does the same at `count` steps.

    What joins the noise embedding is then constant, so a bias takes it up; the outputs are equal up to rounding. All other
    tensors share the network's memory.

    Raises:
        ValueError: as `set_steps`.
    """
    check_counts(count=count)
    steps = _steps(network)
    shift = steps(torch.full_like(steps.count, count))[0]
    state = plain_state(network)
    for name in steps.state_dict(prefix="embed.steps."):
        del state[name]
    state["embed.layer2.bias"] = state["embed.layer2.bias"] + shift
    return state


def _steps(network: nn.Module) -> StepEmbedding:
    steps = getattr(getattr(network, "embed", None), "steps", None)
    if steps is None:
        raise ValueError(
            f"this {type(network).__name__} does not know its number of steps: condition_on_steps(network, count) first"
        )
    return steps

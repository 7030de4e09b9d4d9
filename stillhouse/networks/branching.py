"""K estimates from one network (B-DENSE, arXiv 2602.15971): its output convolution has one group of channels for each.

The groups are ordered by decreasing noise, and the last one is the end point. It alone is read unless all are asked for, so
that outside of its own loss a branched network is the plain one, in cost and in every bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stillhouse.checks import check_counts


class BranchedConv2d(nn.Conv2d):
    """The output convolution of every network here; plain until `widen` gives it branches.

    `weight` (branches * out_channels, in_channels, k, k) and `bias` hold one group of rows after another, so the shapes in
    a state dict say how many there are. The output has out_channels, within `reading_all` branches * out_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.branches = 1
        self.reads_all = False

    def forward(self, x: Tensor) -> Tensor:
        if self.branches == 1 or self.reads_all:
            return super().forward(x)
        return self._conv_forward(x, self.end_point(self.weight), self.end_point(self.bias))

    def end_point(self, rows: Tensor) -> Tensor:
        """View the last group of a weight or bias."""
        return rows[-self.out_channels :]

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", branches={self.branches}" if self.branches > 1 else "")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        weight = state_dict.get(f"{prefix}weight")
        groups, rest = (self.branches, 0) if weight is None else divmod(len(weight), self.out_channels)
        if groups == self.branches or rest or weight.shape[1:] != self.weight.shape[1:]:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
            return
        message = (
            f"these weights have branches={groups}, this network branches={self.branches}: load them into a network with as "
            "many, and then widen or collapse that (stillhouse/networks/branching.py)"
        )
        if message not in errors:  # a network with several heads has one complaint
            errors.append(message)

    @torch.no_grad()
    def _regroup(self, branches: int) -> None:
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            rows = torch.cat([self.end_point(parameter)] * branches)  # keeps the memory format, as repeat does not
            setattr(self, name, nn.Parameter(rows, parameter.requires_grad))
        self.branches = branches


def widen(network: nn.Module, branches: int) -> None:
    """Give the output of a plain network several groups, each with its weights, in place.

    The output convolutions get new parameters: optimisers and averages come after this.

    Args:
        network: a plain network.
        branches: the number of groups; 1 changes nothing.

    Raises:
        ValueError: for branches < 1, a network that has branches already, or one whose output can't have any.
    """
    check_counts(branches=branches)
    if (present := branches_of(network)) > 1:
        raise ValueError(f"branches={branches}: the network has {present} already; collapse it first, or respread them")
    if branches == 1:
        return
    convs = _output_convs(network)
    if not convs:
        raise ValueError(
            f"branches={branches}: the output of {type(network).__name__} is no BranchedConv2d and can't be widened; "
            "build it with one, or set branches=1"
        )
    for conv in convs:
        conv._regroup(branches)


def collapse(network: nn.Module) -> None:
    """Keep the end point's group alone, in place: the plain network, exactly. The output convolutions get new parameters."""
    if branches_of(network) > 1:
        for conv in _output_convs(network):
            conv._regroup(1)


@torch.no_grad()
def respread(network: nn.Module) -> None:
    """Copy the end point's weights into all groups, in place: parameters stay the objects that they are."""
    for conv in _output_convs(network):
        for rows in (conv.weight, conv.bias):
            rows.unflatten(0, (conv.branches, -1))[:-1] = conv.end_point(rows)


def branches_of(network: nn.Module) -> int:
    """Count the branches of a network, 1 for a plain one."""
    return next((conv.branches for conv in _output_convs(network)), 1)


@contextmanager
def reading_all(network: nn.Module) -> Iterator[None]:
    """Make the network's output all branches within the block: (B, branches * C, H, W), one group of C channels after another."""
    convs = [conv for conv in _output_convs(network) if not conv.reads_all]
    for conv in convs:
        conv.reads_all = True
    try:
        yield
    finally:
        for conv in convs:
            conv.reads_all = False


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """Take the state dict that the collapsed network would have; like every state dict it shares the network's memory."""
    state = network.state_dict()
    for name, conv in network.named_modules():
        if isinstance(conv, BranchedConv2d):
            for key in (f"{name}.weight", f"{name}.bias"):
                state[key] = conv.end_point(state[key])
    return state


def _output_convs(network: nn.Module) -> list[BranchedConv2d]:
    return [module for module in network.modules() if isinstance(module, BranchedConv2d)]

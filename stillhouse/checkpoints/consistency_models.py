"""The released consistency models of Song et al. 2023 (openai/consistency_models): ADM's U-Net, ImageNet at 64x64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.checkpoints.published import PublishedCheckpoint, check_equal, load_tensors
from stillhouse.networks.dhariwal_unet import DhariwalAttention, DhariwalUNet

# Their names of our layers, outside of the blocks and within one.
_OUTER = {
    "stem": "input_blocks.0.0",
    "embed.layer1": "time_embed.0",
    "embed.layer2": "time_embed.2",
    "embed.label": "label_emb",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_INNER = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "modulate": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}


class ConsistencyModelCheckpoint(PublishedCheckpoint):
    """A file such as cd_imagenet64_lpips.pt, of a network whose blocks are scaled and shifted by the embedding and change the
    resolution themselves.

    It says neither its resolution nor the width of its attention's heads, which are 64 in all released ones.
    """

    def read(
        self, file: Path, network: nn.Module, preconditioning: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(network, DhariwalUNet):
            raise ValueError(
                f"{file} holds ADM's U-Net, not a {type(network).__name__}: set teacher.network to DhariwalUNet"
            )
        of = type(getattr(preconditioning, "of", preconditioning)).__name__
        pairs = {
            "preconditioning": ("Consistency", type(preconditioning).__name__),
            "preconditioning.of": ("EDM1000", of),
        }
        check_equal(file, pairs)
        state = load_tensors(file)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{file} is no state dict; take a published file, such as cd_imagenet64_lpips.pt")
        return converted(state, network), {"class": "UNetModel"}


def converted(state: Mapping[str, Tensor], network: DhariwalUNet) -> dict[str, Tensor]:
    """Rename and reshape tensors of the released code for our network; what the network does not have keeps its name.

    Args:
        state: tensors by names such as "input_blocks.1.0.in_layers.0.weight".
        network: the network that they are for.

    Returns:
        Tensors by our names, float32.
    """
    layers = {openai_name(name, network): (name, value) for name, value in network.state_dict().items()}
    result = {}
    for name, value in state.items():
        ours, like = layers.get(name, (name, value))
        if ours == "embed.label.weight" and value.ndim == 2:  # a table of rows there, a linear layer here
            value = value.t()
        if value.ndim > like.ndim == 2 and value.numel() == like.numel():  # attention: convolutions there, linear here
            value = value.flatten(1)
        result[ours] = value.to(torch.float32).contiguous()
    return result


def openai_name(name: str, network: DhariwalUNet) -> str:
    """Translate a parameter's name in our network into the released code's."""
    *path, leaf = name.split(".")
    if path[0] not in ("encoder", "decoder"):
        return f"{_OUTER.get('.'.join(path), '.'.join(path))}.{leaf}"
    stage, size, *rest = path
    level = getattr(network, stage)
    sizes = list(level)
    before = sizes[: sizes.index(size)]
    if stage == "encoder":
        index, *layer = rest
        block, place = f"input_blocks.{1 + sum(len(level[s]) for s in before) + int(index)}", 0
    else:
        kind, index, *layer = rest
        earlier = sum(len(level[s].blocks) for s in before)
        if kind == "blocks":
            block, place = f"output_blocks.{earlier + int(index)}", 0
        elif before:  # the block that enlarges is the last part of the level below
            attends = isinstance(level[before[-1]].blocks[-1].attention, DhariwalAttention)
            block, place = f"output_blocks.{earlier - 1}", 1 + attends
        else:
            block, place = "middle_block", 2 * int(index)
    if layer[0] == "attention":
        return f"{block}.{place + 1}.{_ATTENTION[layer[1]]}.{leaf}"
    return f"{block}.{place}.{_INNER[layer[0]]}.{leaf}"

"""Rectified flow's released checkpoints (Liu et al. 2022): Score SDE's network code, whose layers have numbers for names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.checkpoints.published import PublishedCheckpoint, check_equal, load_tensors
from stillhouse.networks.layers import Attention, Downsample
from stillhouse.networks.song_unet import SongUNet

_BLOCK = {
    "norm_in": "GroupNorm_0",
    "conv_in": "Conv_0",
    "shift": "Dense_0",
    "norm_out": "GroupNorm_1",
    "conv_out": "Conv_1",
    "skip": "Conv_2",
}
_PREFIXES = ("module.", "all_modules.")


class RectifiedFlowCheckpoint(PublishedCheckpoint):
    """A checkpoint of the released training code, read for its averaged weights, of a DDPM++ without classes.

    The averages are a list in the order of the trained parameters, whose names the raw network beside it has. The models
    for 256x256 pictures are other networks (NCSN++ with an output pyramid) and are refused by their names.
    """

    @property
    def name(self) -> str:
        return Path(self.file).parent.name  # all have numbers for names

    def read(
        self, file: Path, network: nn.Module, preconditioning: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(network, SongUNet):
            raise ValueError(
                f"{file} holds a DDPM++, not a {type(network).__name__}: set teacher.network to stillhouse.networks.SongUNet"
            )
        kernel = next((m.kernel for m in network.modules() if isinstance(m, Downsample)), None)
        taps = 2 if kernel is None else kernel.shape[-1]
        check_equal(
            file,
            {
                "preconditioning": ("Velocity", type(preconditioning).__name__),
                "network.resample_filter, of taps": (2, taps),
            },
        )
        averages, step = _averages(file)
        return converted(averages, network), {"class": "ExponentialMovingAverage of NCSNpp", "step": step}


def converted(state: Mapping[str, Tensor], network: SongUNet) -> dict[str, Tensor]:
    """Rename and reshape tensors of the released code for our network; what the network does not have keeps its name.

    Args:
        state: tensors by names such as "3.Conv_0.weight".
        network: the network that they are for.

    Returns:
        Tensors by our names.
    """
    names = dict(_names(network))
    return {names.get(name, name): value for name, value in _joined(state).items()}


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the matrices of each attention as linear layers have them, and its queries, keys and values, NIN_0 .. 2, as one."""
    # What is no matrix stays as it is: `check_state` has the message.
    matrices = {name for name, value in state.items() if name.endswith(".W") and value.ndim == 2}
    result = {name: value.t().contiguous() if name in matrices else value for name, value in state.items()}
    for first in [name for name in state if ".NIN_0." in name]:
        names = [first.replace("NIN_0", f"NIN_{i}") for i in range(3)]
        if all(name in state and state[name].shape == state[first].shape != () for name in names):
            result[first.replace("NIN_0", "qkv")] = torch.cat([result.pop(name) for name in names])
    return result


def _names(network: SongUNet) -> Iterator[tuple[str, str]]:
    """Yield the published name of each parameter and ours."""
    for number, (layer, names) in enumerate(_layers(network)):
        for ours, published in names.items():
            name = ".".join(filter(None, (layer, ours)))
            for leaf, _ in network.get_submodule(name).named_parameters():
                published_leaf = {"weight": "W", "bias": "b"}[leaf] if published in ("qkv", "NIN_3") else leaf
                yield ".".join(filter(None, (str(number), published, published_leaf))), f"{name}.{leaf}"


def _layers(network: SongUNet) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield our layers in the order of the published numbers, each with our names within it and the published ones."""
    itself, attention = {"": ""}, {"norm": "GroupNorm_0", "qkv": "qkv", "proj": "NIN_3"}

    def block(name: str) -> Iterator[tuple[str, dict[str, str]]]:
        yield name, _BLOCK
        if isinstance(network.get_submodule(name).attention, Attention):
            yield f"{name}.attention", attention

    yield from (("embed.layer1", itself), ("embed.layer2", itself), ("stem", itself))
    for size, level in network.encoder.items():
        if level.down is not None:
            yield from block(f"encoder.{size}.down")
        for i in range(len(level.blocks)):
            yield from block(f"encoder.{size}.blocks.{i}")
    for size, level in network.decoder.items():
        for kind, blocks in (("entry", level.entry), ("blocks", level.blocks)):
            for i in range(len(blocks)):
                yield from block(f"decoder.{size}.{kind}.{i}")
    yield from ((f"heads.{network.resolution}.{layer}", itself) for layer in ("norm", "conv"))


def _averages(file: Path) -> tuple[dict[str, Tensor], int]:
    """Averaged parameters by their names below `all_modules.`, and the step of training."""
    content = load_tensors(file)
    try:
        names = [name for name in content["model"] if not name.endswith("sigmas")]  # a table, not trained
        values, step = content["ema"]["shadow_params"], content["step"]
        pairs = list(zip(names, values, strict=True))
        fits = all(content["model"][name].shape == value.shape for name, value in pairs)
        step = int(step)
        if not all(isinstance(value, Tensor) for value in values):
            raise TypeError("averages are tensors")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{file} holds no network with its averages; take a checkpoint_N.pth of rectified flow"
        ) from error
    if not fits:
        raise ValueError(f"{file} has averages that are not those of its network; take another checkpoint")
    return {_without_prefixes(name): value for name, value in pairs}, step


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name

"""EDM's and EDM2's published networks (Karras et al. 2022, 2023), and those of ECT, SiD and SiDA, whose codes are built on EDM's.

They are pickles that carry their own source code, none of which is run here.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.checkpoints.inert_pickle import DamagedPickle, Record, RefusedPickle, read_pickle, shown
from stillhouse.checkpoints.pickled_tensors import Storages, parameter_of, tensor_of
from stillhouse.checkpoints.published import PublishedCheckpoint, check_equal
from stillhouse.networks.dhariwal_unet import DhariwalAttention, DhariwalUNet
from stillhouse.networks.edm2_unet import EDM2Attention, EDM2UNet
from stillhouse.networks.layers import Downsample
from stillhouse.networks.song_unet import SongUNet

CHANNELS_PER_HEAD = 64  # of EDM's ADM, which has no option for it, and of EDM2's networks
_LONGEST = 200  # letters of a layer's name
# Class in the file: our preconditioning, and what their attributes are called here.
PRECONDITIONINGS = {
    "EDMPrecond": ("EDM", {"sigma_data": "sigma_data"}),
    "EDMPrecond_EncoderDecoder": ("EDM", {"sigma_data": "sigma_data"}),  # SiDA's
    "ECMPrecond": ("Consistency", {"sigma_min": "sigma_min", "sigma_data": "of.sigma_data"}),  # ECT's, of EDM's
    "VPPrecond": ("VP", {"beta_d": "beta_d", "beta_min": "beta_min", "M": "timesteps"}),
    "VEPrecond": ("VE", {}),
    "Precond": ("EDM", {"sigma_data": "sigma_data"}),  # EDM2's
}
# Their names of our layers, within the network and within a block.
_OUTER = {
    "embed.noise": "map_noise",
    "embed.label": "map_label",
    "embed.augment": "map_augment",
    "embed.layer1": "map_layer0",
    "embed.layer2": "map_layer1",
    "norm_out": "out_norm",
    "conv_out": "out_conv",
}
_INNER = {
    "norm_in": "norm0",
    "conv_in": "conv0",
    "shift": "affine",
    "modulate": "affine",
    "norm_out": "norm1",
    "conv_out": "conv1",
    "skip": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.proj": "proj",
}
# The same of EDM2.
_OUTER_2 = {
    "embed.waves": "emb_fourier",
    "embed.layer1": "emb_noise",
    "embed.label": "emb_label",
    "conv_out": "out_conv",
}
_INNER_2 = {
    "conv_in": "conv_res0",
    "modulate": "emb_linear",
    "conv_out": "conv_res1",
    "skip": "conv_skip",
    "attention.qkv": "attn_qkv",
    "attention.proj": "attn_proj",
}


class EDMPickle(PublishedCheckpoint):
    """A network pickle as EDM, EDM2, ECT, SiD and SiDA publish them, or as their training writes them (network-snapshot-*.pkl).

    What the file says of its preconditioning, size, classes, resampling and heads must be what is configured, and so must
    every name and shape; dropout and hidden labels, which sampling does not see, are the configured network's own.
    """

    def read(
        self, file: Path, network: nn.Module, preconditioning: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(network, SongUNet | DhariwalUNet | EDM2UNet):
            raise ValueError(
                f"{file} holds a SongUNet or a DhariwalUNet of EDM, or a UNet of EDM2, not a {type(network).__name__}: set "
                "teacher.network"
            )
        outer = _ema(file)
        try:
            inner = _child(outer, "unet" if outer.name == "Precond" else "model")
            _check_preconditioning(file, outer, preconditioning)
            state = dict(_tensors(inner))
            _check_network(file, outer, inner, state, network)
        except DamagedPickle as error:
            raise OSError(f"{file} has another layout than EDM's networks ({error}); fetch it again") from error
        return converted(state, network), {"class": f"{outer.name} of {inner.name}"}


def converted(state: Mapping[str, Tensor], network: SongUNet | DhariwalUNet | EDM2UNet) -> dict[str, Tensor]:
    """Rename and reshape EDM's tensors for our network; what the network does not have keeps its name.

    Args:
        state: tensors by EDM's names below `model.`, or `unet.` of EDM2.
        network: the network that they are for.

    Returns:
        Tensors by our names.
    """
    layers = {edm_name(name, network): (name, value) for name, value in network.state_dict().items()}
    result = {}
    for name, value in state.items():
        if name.endswith("resample_filter"):
            continue
        ours, like = layers.get(name, (name, value))
        if name not in layers or value.numel() != like.numel():  # `check_state` has the message
            result[ours] = value
            continue
        if "qkv" in name and value.ndim and len(value) % 3 == 0:  # q0, k0, v0, q1, ... there; all q, all k, all v here
            value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if (
            value.ndim == 4 and like.ndim == 2 and value.shape[2:] == (1, 1)
        ):  # attention: a convolution there, linear here
            value = value.flatten(1)
        result[ours] = value.contiguous()
    return result


def edm_name(name: str, network: SongUNet | DhariwalUNet | EDM2UNet) -> str:
    """Translate a parameter's or buffer's name in our network into EDM's name below `model.`, or `unet.` of EDM2."""
    if isinstance(network, EDM2UNet):
        return _edm2_name(name, network)
    *path, leaf = name.split(".")
    if path[0] == "stem":
        return f"enc.{_square(network.resolution)}_conv.{leaf}"
    if path[0] not in ("encoder", "decoder", "heads"):
        return f"{_OUTER['.'.join(path)]}.{leaf}"
    stage, size, *rest = path
    if stage == "heads":
        return f"dec.{_square(size)}_aux_{rest[0]}.{leaf}"
    if stage == "decoder":
        kind, index, *layer = rest
        entry = f"in{index}" if int(size) == network.encoder_resolution else "up"
        block = entry if kind == "entry" else f"block{index}"
    elif isinstance(network, DhariwalUNet):
        index, *layer = rest
        first = int(size) < network.resolution  # that block shrinks
        block = "down" if first and index == "0" else f"block{int(index) - first}"
    elif rest[0] == "inject":
        kind = "residual" if network.encoder[size].inject.conv.kernel_size == (3, 3) else "skip"
        return f"enc.{_square(size)}_aux_{kind}.{leaf}"
    else:
        kind, *layer = rest
        block = kind if kind == "down" else f"block{layer.pop(0)}"
    return f"{stage[:3]}.{_square(size)}_{block}.{_INNER['.'.join(layer)]}.{leaf}"


def _edm2_name(name: str, network: EDM2UNet) -> str:
    *path, leaf = name.split(".")
    if not path:
        return f"out_{leaf}"
    if path[0] == "stem":
        return f"enc.{_square(network.resolution)}_conv.{leaf}"
    if path[0] not in ("encoder", "decoder"):
        return f"{_OUTER_2['.'.join(path)]}.{leaf}"
    stage, size, *rest = path
    if stage == "encoder":
        index, *layer = rest
        first = int(size) < network.resolution  # that block shrinks
        block = "down" if first and index == "0" else f"block{int(index) - first}"
    else:
        kind, index, *layer = rest
        entry = f"in{index}" if int(size) == network.encoder_resolution else "up"
        block = entry if kind == "entry" else f"block{index}"
    inner = f"{_INNER_2['.'.join(layer)]}.{leaf}" if layer else f"emb_{leaf}"
    return f"{stage[:3]}.{_square(size)}_{block}.{inner}"


def _square(size: int | str) -> str:
    return f"{size}x{size}"


def _ema(file: Path) -> Record:
    """Read the averaged network. Raises OSError for a damaged file, ValueError for one that asks for more than data."""
    try:
        with open(file, "rb") as stream:
            makers = {**_MAKERS, "torch.storage._load_from_bytes": Storages()}
            content = read_pickle(stream, file.stat().st_size, makers)
    except DamagedPickle as error:
        raise OSError(f"{file} is damaged, cut short or no pickle ({error}); delete it and fetch it again") from error
    except RefusedPickle as error:
        raise ValueError(
            f"{file} was refused: it has {error}, which no network of EDM needs; nothing in it was executed"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("ema"), Record):
        raise ValueError(
            f"{file} holds no averaged network ('ema'); take a published file or a network-snapshot of EDM's"
        )
    return content["ema"]


def _attributes(module: Any) -> dict[str, Any]:
    if not isinstance(module, Record) or not isinstance(module.state, dict):
        raise DamagedPickle("what should be a layer is none")
    return module.state


def _children(module: Any) -> dict[str, Any]:
    children = _attributes(module).get("_modules")
    if not isinstance(children, dict):
        raise DamagedPickle("a layer has no list of layers")
    return {name: child for name, child in children.items() if child is not None}


def _child(module: Record, name: str) -> Record:
    children = _children(module)
    if name not in children:
        raise DamagedPickle(f"it has no {name}")
    _attributes(children[name])
    return children[name]


def _tensors(root: Record) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their dotted names."""
    reached, waiting = set(), [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in reached:
            raise DamagedPickle("a layer is held twice")
        if len(prefix) > _LONGEST:
            raise DamagedPickle(f"its layers {shown(prefix)} are nested too deeply")
        reached.add(id(module))
        for group in ("_parameters", "_buffers"):
            values = _attributes(module).get(group) or {}
            if not isinstance(values, dict):
                raise DamagedPickle(f"the layer {shown(prefix)} has a {type(values).__name__} of tensors")
            for name, value in values.items():
                if value is not None:
                    yield f"{prefix}{name}", parameter_of(value)
        waiting += [(f"{prefix}{name}.", child) for name, child in _children(module).items()]


def _check_preconditioning(file: Path, outer: Record, preconditioning: nn.Module) -> None:
    if outer.name not in PRECONDITIONINGS:
        raise ValueError(f"{file} holds a {shown(outer.name)[1:-1]}; {', '.join(PRECONDITIONINGS)} can be read")
    name, constants = PRECONDITIONINGS[outer.name]
    check_equal(file, {"preconditioning": (name, type(preconditioning).__name__)})
    if name == "Consistency":
        check_equal(file, {"preconditioning.of": ("EDM", type(preconditioning.of).__name__)})
    have = _attributes(outer)
    check_equal(
        file,
        {
            f"preconditioning.{ours}": (have.get(name), attrgetter(ours)(preconditioning))
            for name, ours in constants.items()
        },
    )


def _check_network(
    file: Path,
    outer: Record,
    inner: Record,
    state: Mapping[str, Tensor],
    network: SongUNet | DhariwalUNet | EDM2UNet,
) -> None:
    have = _attributes(outer)
    attentions = [m for m in network.modules() if isinstance(m, DhariwalAttention | EDM2Attention)]
    heads = {m.proj.weight.shape[0] // m.heads for m in attentions}
    kind = "EDM2UNet" if inner.name == "UNet" else inner.name.removesuffix("_EncoderDecoder")
    pairs = {
        "network": (kind, type(network).__name__),
        "network.resolution": (have.get("img_resolution"), network.resolution),
        "network.in_channels": (have.get("img_channels"), network.in_channels),
        "network.num_classes": (have.get("label_dim"), network.num_classes),
    }
    if heads:
        pairs["network.channels_per_head"] = (CHANNELS_PER_HEAD, heads.pop())
    kernel = next((m.kernel for m in network.modules() if isinstance(m, Downsample)), None)
    filters = (value for name, value in state.items() if name.endswith("resample_filter"))
    if kernel is not None:
        for published in filters:
            if published.shape != kernel.shape or not torch.allclose(published.float(), kernel.cpu(), atol=1e-6):
                pairs["network.resample_filter, of taps"] = (
                    published.shape[-1] if published.ndim else 0,
                    kernel.shape[-1],
                )
    check_equal(file, pairs)


def _persistent(meta: Any) -> Record:
    """Record the class's name and attributes of an object that torch_utils.persistence would rebuild from its source code."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise DamagedPickle("an object without a class")
    return Record(meta["class_name"], meta.get("state"))


def _numpy_scalar(dtype: Any, data: Any) -> float | int:
    if not isinstance(dtype, Record) or not isinstance(data, bytes) or dtype.state is None or dtype.state[1] != "<":
        raise DamagedPickle("a number of an unknown kind")
    return np.frombuffer(data, f"<{dtype.name}", count=1).item()


def _numpy_dtype(code: Any, *_: Any) -> Record:
    if code not in ("f8", "f4", "i8", "i4"):
        raise DamagedPickle("a number of an unknown kind")
    return Record(code)


def _empty() -> dict:
    """Make the dict whose items follow in the file."""
    return {}


# All that these files mention.
_MAKERS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": lambda: Record("ModuleDict"),
    "torch._utils._rebuild_parameter": parameter_of,
    "torch._utils._rebuild_tensor_v2": tensor_of,
    "collections.OrderedDict": _empty,
    "dnnlib.util.EasyDict": _empty,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}

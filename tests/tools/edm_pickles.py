"""Pickles in the layout of EDM's published networks, made without its code."""

import copyreg
import pickle
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from network_tools import noise
from torch import Tensor, nn

from stillhouse.checkpoints.edm_pickle import edm_name

SOURCE_CODE = "raise SystemExit('the source code of the file was executed')"


class Persistent:
    """Reduces as an object of a class that torch_utils.persistence decorates."""

    def __init__(self, class_name: str, state: dict):
        self.class_name, self.attributes = class_name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": SOURCE_CODE, "class_name": self.class_name}
        return (
            sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj,
            ({**meta, "state": self.attributes},),
            None,
        )


class EasyDict(dict):
    def __reduce_ex__(self, protocol):  # as Python 3.8 writes it: with a state that is empty
        return copyreg.__newobj__, (EasyDict,), {}, None, iter(self.items())


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file was unpickled")


@contextmanager
def edms_modules():
    """Within, the two modules of EDM that its files mention exist."""
    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    names = {"torch_utils": ModuleType("torch_utils"), "dnnlib": ModuleType("dnnlib")}
    with (
        mock.patch.dict(sys.modules, {**names, "torch_utils.persistence": persistence, "dnnlib.util": util}),
        mock.patch.object(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence"),
        mock.patch.object(EasyDict, "__module__", "dnnlib.util"),
    ):
        yield


def layer(tensors: dict[str, Tensor], class_name: str | None = None, **attributes) -> Persistent | nn.ModuleDict:
    """A layer, and those within it, from dotted names; `enc` and `dec` are plain dictionaries of layers, as EDM's."""
    base = nn.ModuleDict() if class_name == "ModuleDict" else nn.Module()
    below: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
        elif first in ("resample_filter", "freqs", "phases"):
            base._buffers[first] = value
        else:
            base._parameters[first] = nn.Parameter(value, requires_grad=False)
    for name, inner in below.items():
        base._modules[name] = layer(inner, "ModuleDict" if name in ("enc", "dec") else f"Layer of {name}")
    base._modules["absent"] = None
    if class_name == "ModuleDict":
        return base
    return Persistent(class_name, {**vars(base), "skip_scale": np.sqrt(0.5), "_init_args": (), **attributes})


def write_edm(path: Path, tensors: dict[str, Tensor], precond: str, model: str = "SongUNet", **attributes) -> Path:
    """tensors: by EDM's names below `model.`, or `unet.` of EDM2; attributes: of the preconditioning."""
    beside = {"logvar_fourier.freqs": torch.zeros(8), "logvar_linear.weight": torch.zeros(1, 8)}
    net = layer(beside if precond == "Precond" else {}, precond, **attributes)
    inner = layer(tensors, model, _init_kwargs=EasyDict(channel_mult=[1, 2]))
    net.attributes["_modules"]["unet" if precond == "Precond" else "model"] = inner
    content = {
        "ema": net,
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "taps": torch.arange(3.0)}),
        "dataset_kwargs": EasyDict(path="images.zip", use_labels=False, max_size=50000),
    }
    with edms_modules(), open(path, "wb") as file:
        pickle.dump(content, file)
    return path


def theirs(network) -> dict[str, tuple[int, ...]]:
    """EDM's names and shapes of all that the network has."""
    square = re.compile(r"\.(qkv|proj)\.weight$")
    shapes = {edm_name(name, network): tuple(value.shape) for name, value in network.state_dict().items()}
    return {name: (*shape, 1, 1) if square.search(name) else shape for name, shape in shapes.items()}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """As `network_tools.fill`, in the layout of the file: values by shape alone."""
    result = {}
    for name, shape in shapes.items():
        if not shape:  # a gain
            result[name] = torch.tensor(0.7)
            continue
        new = noise(torch.Size(shape).numel(), *shape)
        last = name.endswith("weight")
        result[name] = 0.2 * new + last if len(shape) == 1 else new / new[0].numel() ** 0.5
    return result

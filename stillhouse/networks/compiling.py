"""Networks that torch compiles in place: names in a state dict stay, and copies are plain."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")  # two modes and a backend
# Compiled versions of Module's call, which all networks share: one for each network's form, kind of pass and size of batch.
_VERSIONS = 128


def check_compile(option: str, value: bool | str) -> None:
    """Check an option that switches compilation.

    Args:
        option: its name, for the message.
        value: false, true (torch's default backend, inductor), one of its `MODES` or a backend's name.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or value in MODES:
        return
    known = torch.compiler.list_backends(exclude_tags=()) if isinstance(value, str) else []
    if value not in known:
        raise ValueError(
            f"{option} must be true, false, a mode of torch.compile ({', '.join(MODES)}) or the name of a torch.compile "
            f"backend, got {value!r}"
        )


def uses_cuda_graphs(value: bool | str) -> bool:
    """Whether so compiled networks are recorded as CUDA graphs, which need an NVIDIA GPU."""
    return value in _CUDA_GRAPHS


def compile_network(network: nn.Module, how: bool | str) -> None:
    """Compile a network in place, as a value says that `check_compile` accepts: true, a mode or a backend.

    Each size of batch has a version of its own, which is faster than one for all: micro-batches have two sizes at most.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VERSIONS)
    if how is True or how in MODES:
        network.compile(mode=None if how is True else how, dynamic=False)
    else:
        network.compile(backend=how, dynamic=False)


def undo_compilation(network: nn.Module) -> None:
    """Make a network plain again, in place."""
    network._compiled_call_impl = None


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Run a network uncompiled within the block: for measurements, and for batches of other sizes than training's."""
    compiled, network._compiled_call_impl = network._compiled_call_impl, None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled

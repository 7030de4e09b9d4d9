"""Networks that torch compiles in place: names in a state dict stay, and copies are plain."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def check_compile(option: str, value: bool | str) -> None:
    """Check an option that switches compilation.

    Args:
        option: its name, for the message.
        value: false, true (torch's default backend, inductor) or a backend's name.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool):
        return
    known = torch.compiler.list_backends(exclude_tags=()) if isinstance(value, str) else []
    if value not in known:
        raise ValueError(f"{option} must be true, false or the name of a torch.compile backend, got {value!r}")


def compile_network(network: nn.Module, backend: bool | str) -> None:
    """Compile a network in place by a backend that `check_compile` accepts, True for the default one."""
    network.compile(backend="inductor" if backend is True else backend)


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

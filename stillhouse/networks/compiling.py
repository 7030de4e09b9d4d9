"""Networks that torch compiles in place: names in a state dict stay, and copies are plain."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def check_compile(option: str, value: bool | str) -> None:
    """Errors: ValueError for anything but false, true (torch's default backend, inductor) or a backend's name."""
    if isinstance(value, bool):
        return
    known = torch.compiler.list_backends(exclude_tags=()) if isinstance(value, str) else []
    if value not in known:
        raise ValueError(f"{option} must be true, false or the name of a torch.compile backend, got {value!r}")


def compile_network(network: nn.Module, backend: bool | str) -> None:
    network.compile(backend="inductor" if backend is True else backend)


def undo_compilation(network: nn.Module) -> None:
    network._compiled_call_impl = None


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Runs a network uncompiled: for measurements, and for batches of other sizes than training's."""
    compiled, network._compiled_call_impl = network._compiled_call_impl, None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled

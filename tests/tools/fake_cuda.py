"""A CUDA device without a GPU: PyTorch's fake tensors, which have a shape, a dtype and a device but no values.

What computes on "cuda" is checked as a GPU would check it, and the host is caught where it would wait for the device. What is
on the CPU computes as ever: batches, noise levels and numbers of steps are the real ones.
"""

import linecache
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
# Their result's size, or their answer, is a value that is on the device.
_ANSWERS = {
    _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount,
    _aten.repeat_interleave, _aten.equal, _aten.allclose, _aten.is_nonzero, _aten._linalg_check_errors,
}  # fmt: skip
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_}


class HostWaits(AssertionError):
    """The host would wait for the device."""


class WrongDevice(AssertionError):
    """A computation mixes devices."""


class FakeCuda(TorchDispatchMode):
    """Within, "cuda" is a device. Raises WrongDevice and HostWaits, which name the line of this project that does it.

    The host waits for values of the device (`item`, `tolist`, `bool`, a copy to the CPU, sizes that depend on values such as
    those of `x[mask]`), and for copies to it: `torch.tensor(value, device=...)`, `to(device)` without non_blocking, a tensor on
    the CPU as an index. A scalar tensor on the CPU among tensors on the device is neither: PyTorch takes its value as a number,
    as it would a float.

    Args:
        may_wait: Functions, as "module.function", within which the host may wait, each with the reason and what the device then
            answers.
        hot: Functions within which it may not, where they are called by one of those; the innermost one decides.

    Attributes:
        step: The training step under way, which a test counts.
        waits: In which steps the host waited, by function.
    """

    def __init__(self, may_wait: Mapping[str, tuple[str, int]] = {}, hot: Collection[str] = ()):
        super().__init__()
        self.may_wait, self.hot = may_wait, hot
        self.step, self.waits = 0, defaultdict[str, set[int]](set)

    def wait(self, what: str) -> int:
        """Say that the host waits; gives the device's answer."""
        for frame in _frames():
            name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
            if name in self.hot:
                break
            if name in self.may_wait:
                self.waits[name].add(self.step)
                return self.may_wait[name][1]
        raise HostWaits(f"{_place()}: the host waits for the device ({what})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # most calls
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        if not any(map(_on_device, tensors)) and (target is None or target.type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        op = func.overloadpacket
        if op in (_aten._to_copy, _aten.copy_):
            source = args[-1] if op is _aten._to_copy else args[1]
            to_device = _on_device(args[0]) if target is None else target.type == "cuda"
            blocking = not (kwargs.get("non_blocking") or (op is _aten.copy_ and len(args) > 2 and args[2]))
            if _on_device(source) and not to_device:
                value = self.wait("a copy to the CPU")
                with unset_fake_temporarily():
                    if op is _aten.copy_:
                        return args[0].fill_(value)
                    return torch.full(source.shape, value, dtype=kwargs.get("dtype") or source.dtype)
            if not _on_device(source) and blocking:
                self.wait("a copy to the device without non_blocking")
        elif op is _aten._local_scalar_dense:
            value = self.wait("a value of the device")
            return float(value) if args[0].is_floating_point() else value
        elif op in _ANSWERS:
            self.wait(f"{op}: the result depends on values of the device")
        elif op in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            filled = op is not _aten.index and args[2].numel() == 1 and not _on_device(args[2])  # masked_fill
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not filled:
                self.wait("a mask as an index, whose size depends on values of the device")
            if not all(map(_on_device, indices)):
                self.wait("an index on the CPU")
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "device" not in str(error):
                raise
            raise WrongDevice(f"{_place()}: {func}: {error}") from error

    @contextmanager
    def entered(self) -> Iterator["FakeCuda"]:
        """The device, and what else of torch asks for a driver, within the block."""

        def run_backward(outputs: Sequence[Tensor], *arguments: Any, **options: Any) -> Any:
            if not any(map(_on_device, outputs)):
                return engine(outputs, *arguments, **options)
            with torch.no_grad():
                return _run_backward(outputs, *arguments, **options)

        def wait(*_: Any) -> None:
            self.wait("synchronize")

        def to(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
            device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
            on_device = device is not None and device.type == "cuda" and dtype is None
            if on_device and all(map(_on_device, (*module.parameters(), *module.buffers()))):
                return module  # torch refuses to move fake tensors that are in use
            return move(module, *arguments, **options)

        engine, move = torch.autograd._engine_run_backward, nn.Module.to
        with (
            patch("torch.autograd._engine_run_backward", run_backward),
            patch("torch.nn.Module.to", to),
            patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            patch("torch.cuda.is_bf16_supported", lambda *_: True),
            patch("torch.cuda.get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),  # which lies on the CPU
            patch("torch.cuda.set_rng_state", lambda *_: None),
            patch("torch.cuda.synchronize", wait),
            patch("torch.cuda.Stream", return_value=MagicMock(synchronize=wait)),
            patch("torch.cuda.stream"),
            patch("torch.cuda.current_stream", return_value=MagicMock(synchronize=wait)),
            patch("torch.cuda.Event", return_value=MagicMock(synchronize=wait, elapsed_time=lambda _: 1.0)),
            patch("torch.Tensor.record_stream", lambda *_: None),
            FakeTensorMode(allow_non_fake_inputs=True),
            self,
        ):
            yield self


def _on_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place() -> str:
    """The innermost line of this project's code under way, or of a test's."""
    frames = [frame for frame in _frames() if frame.f_code.co_filename != __file__]
    places = [(Path(frame.f_code.co_filename), frame.f_lineno) for frame in frames]
    # An environment of its own lies within the checkout (`.venv`), as `make` lays it.
    ours = [place for place in places if place[0].is_relative_to(ROOT) and not place[0].is_relative_to(sys.prefix)]
    code = [place for place in ours if not place[0].is_relative_to(ROOT / "tests")]
    path, line = (code or ours or places)[0]
    return f"{path.relative_to(ROOT) if ours else path}:{line} `{linecache.getline(str(path), line).strip()}`"


def _run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """Torch's engine, which refuses a device that is not there: each node of the graph once all that lead to it are done."""
    received: dict[Any, dict[int, Tensor]] = {}

    def give(node: Any, number: int, gradient: Tensor | None) -> None:
        if node is not None and gradient is not None:
            expected = node._input_metadata[number]
            # As the engine does behind each node.
            if gradient.shape != expected.shape or gradient.dtype != expected.dtype:
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
            slots = received.setdefault(node, {})
            slots[number] = slots[number] + gradient if number in slots else gradient

    edges = [get_gradient_edge(output) for output in outputs]
    for edge, gradient in zip(edges, gradients, strict=True):
        give(edge.node, edge.output_nr, gradient)
    missing, seen, stack = Counter[Any](), set(), [edge.node for edge in edges]
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            following = [n for n, _ in node.next_functions if n is not None]
            missing.update(following)
            stack += following
    wanted = {(edge.node, edge.output_nr): i for i, edge in enumerate(map(get_gradient_edge, inputs))}
    found: list[Tensor | None] = [None] * len(inputs)
    ready = [node for node in dict.fromkeys(edge.node for edge in edges) if not missing[node]]
    while ready:
        node = ready.pop()
        slots, results = received.pop(node, {}), ()
        for number, gradient in slots.items():
            if (node, number) in wanted:
                found[wanted[node, number]] = gradient
        if slots and (accumulate_grad or not hasattr(node, "variable")):
            results = node(*[slots.get(i) for i in range(len(node._input_metadata))])
            results = results if isinstance(results, tuple) else (results,)
        for i, (following, number) in enumerate(node.next_functions):
            give(following, number, results[i] if i < len(results) else None)
            if following is not None:
                missing[following] -= 1
                ready += [following] if not missing[following] else []
    return tuple(found)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


def place_on_fake_cuda(trainer: pl.Trainer) -> None:
    """Let a trainer of one process on the CPU train on the fake device."""
    strategy = trainer.strategy
    strategy._root_device, strategy.accelerator = DEVICE, _Accelerator()
    strategy.teardown = lambda: None  # where weights would be moved back to the CPU
    strategy.save_checkpoint = lambda *_, **__: None  # all but the file

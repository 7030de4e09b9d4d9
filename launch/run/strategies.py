"""Lightning's strategies for several processes: how these find each other, and how they average gradients and count the bytes."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, nn

from launch.process_environment import started_processes
from launch.signals import NOTICE, SIGNALS

LINE_SECONDS = 10.0  # between two lines of a waiting process
_GRACE = 2.0  # seconds in which a waiting process ends by a signal itself
_HOW = (
    "start the same command on each machine, with the first one's MASTER_ADDR and a free MASTER_PORT, the same on all, and "
    "NODE_RANK from 0 on; or by srun or torchrun"
)
BUCKET = 25 << 20  # bytes, DDP's: large enough for the network's speed, small enough to start early


def check_machines(num_nodes: int) -> None:
    """Check that the processes of other machines can find this one.

    Raises:
        ValueError: Where other machines could not find this one, since nobody says where it is.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if num_nodes > 1 and not started_processes() and missing:
        raise ValueError(f"trainer.num_nodes={num_nodes} needs {' and '.join(missing)}: {_HOW}")


@contextmanager
def announced(num_nodes: int, num_processes: int) -> Iterator[None]:
    """Around the wait for other machines' processes: say every ten seconds what for, and where they are looked for.

    Whoever waits there hears no signal; so one of launch/signals.py's ends the process here.
    """
    if num_nodes < 2 or int(os.environ.get("LOCAL_RANK", 0)) > 0 or not _main():
        yield
        return
    met = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    thread = threading.Thread(target=_wait, args=(reading, met, waiting_line(num_nodes, num_processes)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        met.set()
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)


def waiting_line(num_nodes: int, num_processes: int) -> str:
    """Return the line on what the first process of a machine waits for."""
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    if started_processes():
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK" if "RANK" in os.environ else "SLURM_PROCID")
    address = ", ".join(f"{name}={os.environ.get(name, 0)}" for name in names)
    return f"waiting for the {num_nodes * num_processes} processes of trainer.num_nodes={num_nodes} machines ({address}): {_HOW}"


def _wait(reading: int, met: threading.Event, line: str) -> None:
    while not met.is_set():
        if not select.select([reading], [], [], LINE_SECONDS)[0]:
            print(line, file=sys.stderr, flush=True)
        elif (number := os.read(reading, 1)[0]) in SIGNALS and not met.wait(_GRACE):
            NOTICE.end_now(number)


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()


class Launcher(_SubprocessScriptLauncher):
    """Keeps the processes that it started in `children`, where Lightning's thread, which kills this one without a word when
    one of them failed, does not find them; launch/run/processes.py looks after them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.children: list[subprocess.Popen] = []

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []


class CountingStrategy(DDPStrategy):
    """What both strategies share: the bytes of gradients that a process has given to all-reduce, and agreement between hosts.

    A ring of N processes sends 2 (N - 1) / N times these bytes from each of them. Where a backend pads or compresses, or what
    other collectives cost (a few bytes for logs and checkpoints), is not in this figure.
    """

    bytes_reduced = 0

    def _configure_launcher(self) -> None:
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_distributed(self) -> None:
        with announced(self.num_nodes, self.num_processes):
            super().setup_distributed()
        # Flags between hosts would wait for the device in NCCL's queue.
        self._hosts = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of `flags`, as many on each rank, hold on any of them. Hosts agree on it; no device is waited for."""
        union = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(union, op=dist.ReduceOp.MAX, group=self._hosts)
        return union.bool().tolist()


class CountedDDP(CountingStrategy):
    """Lightning's DDP strategy, counted: buckets are reduced while the backward pass goes on."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, self._reduce)

    def _reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Divide first, then sum, as DDP does."""
        flat = bucket.buffer()
        self.bytes_reduced += flat.nbytes
        flat.div_(self.world_size)
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda future: future.value()[0])


class AveragedGradients(CountingStrategy):
    """Averages, after each backward pass, the gradients of the parameters that the pass reached on any rank; no others.

    So where updates of several networks follow each other, one costs the bytes of its network alone, and a backward pass
    inside of `block_backward_sync` costs none. DDP with find_unused_parameters=True sends zeros for all other networks in
    each pass: twice the bytes for diff_instruct, whose two networks are of one size (benchmarks, part scaling). What
    DDP has and this has not: its buckets travel while the backward pass goes on. Here they travel after it, so
    with one network, large, on slow links, `trainer.strategy=ddp` can be the quicker one.

    Weights and buffers are rank 0's when training starts, and equal on all ranks to the last bit from then on. Which
    parameters were reached is agreed upon between the hosts in each pass, so one that a single rank's loss reached is
    averaged too (the others add zero) instead of hanging. It must be a pass through Lightning (`manual_backward`).
    An infinite gradient on one rank is infinite on all after the average: a GradScaler skips the step on all of them.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._parameters: list[nn.Parameter] = []
        self._reached: set[int] = set()  # places in that list, since the last average
        self._hooks: list[Any] = []
        self._blocked = False

    def configure_ddp(self) -> None:
        """In place of a wrapper: one beginning for all."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        trained = {p: None for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self._parameters = [parameter for parameter in trained if parameter.requires_grad]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, place=place: self._reached.add(place))
            for place, parameter in enumerate(self._parameters)
        ]

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self._blocked = True
        try:
            yield
        finally:
            self._blocked = False

    def post_backward(self, closure_loss: Tensor) -> None:
        if not self._blocked:
            reached = self.on_any_rank([place in self._reached for place in range(len(self._parameters))])
            self._reached.clear()
            self._average([p for p, used in zip(self._parameters, reached, strict=True) if used])

    @torch.no_grad()
    def _average(self, parameters: list[nn.Parameter]) -> None:
        under_way = []
        for bucket in buckets(parameters):
            gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.world_size)
            self.bytes_reduced += flat.nbytes
            under_way.append((bucket, gradients, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, gradients, flat, work in under_way:
            work.wait()
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])
            for parameter, gradient in zip(bucket, gradients, strict=True):
                parameter.grad = gradient

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().teardown()


def buckets(parameters: Sequence[nn.Parameter], size: int = BUCKET) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, cut where the kind of number changes or `size` bytes are reached."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if bucket and (held >= size or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.nbytes
    if bucket:
        yield bucket

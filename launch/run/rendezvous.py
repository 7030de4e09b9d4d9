"""How the processes of several machines find each other, and what one says that waits for the others."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from launch.process_environment import started_processes
from launch.signals import NOTICE, SIGNALS

EVERY = 10.0  # seconds between two lines
_GRACE = 2.0  # seconds in which a waiting process ends by a signal itself
_HOW = (
    "start the same command on each machine, with the first one's MASTER_ADDR and a free MASTER_PORT, the same on all, and "
    "NODE_RANK from 0 on; or by srun or torchrun"
)


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
    """What the first process of a machine waits for."""
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    if started_processes():
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK" if "RANK" in os.environ else "SLURM_PROCID")
    found = ", ".join(f"{name}={os.environ.get(name, 0)}" for name in names)
    return f"waiting for the {num_nodes * num_processes} processes of trainer.num_nodes={num_nodes} machines ({found}): {_HOW}"


def _wait(reading: int, met: threading.Event, line: str) -> None:
    while not met.is_set():
        if not select.select([reading], [], [], EVERY)[0]:
            print(line, file=sys.stderr, flush=True)
        elif (number := os.read(reading, 1)[0]) in SIGNALS and not met.wait(_GRACE):
            NOTICE.end_now(number)


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()

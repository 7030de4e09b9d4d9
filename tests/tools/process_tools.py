"""Two processes in which a Trainer with two devices finds its place."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch


def in_two_processes(function: Callable[..., None], *args, limit: float = 60) -> None:
    """Runs function(rank, *args) in two processes, in which a Trainer with TWO finds its place."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Forked: a new interpreter would spend many seconds on imports.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(function, rank, port, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(limit)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(function: Callable[..., None], rank: int, port: int, *args) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    function(rank, *args)

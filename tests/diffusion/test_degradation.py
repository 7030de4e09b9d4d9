"""A degradation path that several jobs record at once."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from torch import nn

from diffusion import degradation
from diffusion.degradation import DegradationPath

TEACHER = SimpleNamespace(name="teacher", hash="0" * 64, licence="Apache-2.0")


def test_two_jobs_at_once_write_each_node_once(tmp_path, monkeypatch):
    """Each with weights of its own, as two GPUs may compute them."""
    calls, save = [], degradation.save_weights

    def slowly(path, *args):
        calls.append(path)
        time.sleep(0.2)
        save(path, *args)

    monkeypatch.setattr(degradation, "save_weights", slowly)
    networks = [nn.Linear(2, 2) for _ in range(2)]

    def record(index):
        path = DegradationPath(tmp_path, TEACHER, "1" * 64, [3], {})
        path.save(3, networks[index], images=30, seconds=float(index))
        return path

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(record, range(2)))
    assert len(calls) == 1
    loaded = nn.Linear(2, 2)
    paths[0].load(3, loaded)  # its card names the hash of its weights
    first = int(paths[0].cost()["seconds"])
    assert torch.equal(loaded.weight, networks[first].weight)

"""A degradation path that several jobs record at once."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_modules.components import degradation_path as degradation
from lightning_modules.components.degradation_path import DegradationPath

TEACHER = SimpleNamespace(name="teacher", hash="0" * 64, form="2" * 64, licence="Apache-2.0")


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


@pytest.mark.parametrize("verify", [False, True])
def test_a_changed_bit_of_a_node_is_found_when_it_is_loaded(tmp_path, verify):
    path = DegradationPath(tmp_path, TEACHER, "1" * 64, [3], {})
    path.save(3, nn.Linear(2, 2), images=30, seconds=1.0)
    path.load(3, nn.Linear(2, 2), verify)
    data = bytearray(path.file(3).read_bytes())
    data[-1] ^= 1
    path.file(3).write_bytes(data)
    with pytest.raises(OSError, match="node .*node-000003.safetensors is damaged: delete the file and run again"):
        path.load(3, nn.Linear(2, 2), verify)


def test_a_node_of_a_teacher_of_another_form_is_refused(tmp_path):
    """Another number of heads, say, on the same weights, hence the same hash."""
    path = DegradationPath(tmp_path, TEACHER, "1" * 64, [3], {})
    path.save(3, nn.Linear(2, 2), images=30, seconds=1.0)
    other = DegradationPath(tmp_path, SimpleNamespace(**vars(TEACHER) | {"form": "3" * 64}), "1" * 64, [3], {})
    with pytest.raises(ValueError, match="belongs to another degradation path .form '22.* instead of '33.*: move that"):
        other.load(3, nn.Linear(2, 2))
    card = json.loads(path.file(3).with_suffix(".json").read_text())
    del card["form"]  # as earlier versions wrote it
    path.file(3).with_suffix(".json").write_text(json.dumps(card))
    other.load(3, nn.Linear(2, 2))

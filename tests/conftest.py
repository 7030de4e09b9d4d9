"""One thread per process: tests start and fork processes, and a forked child of a multi-threaded torch can hang."""

import gc
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import pytest  # noqa: E402
import read_once  # noqa: E402, F401
import torch  # noqa: E402

torch.set_num_threads(1)
# Autograd starts a thread for each GPU at its first pass, and can't be forked from then on. Now there is none; once there were
# fake tensors, torch would count a fake one.
torch.zeros((), requires_grad=True).backward()
_LONG = ("tests", "end_to_end", "docs", "lightning_modules")  # folders of files that take long


def pytest_collection_modifyitems(items):
    """Long files first, so that no process is left with one when the other has nothing to do."""
    items.sort(key=lambda item: _LONG.index(item.path.parent.name) if item.path.parent.name in _LONG else len(_LONG))


def pytest_collection_finish():
    """What imports made stays; a tenth of the time would go into searching it for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """Lightning's launchers leave MASTER_PORT behind; a later test's processes would all meet at that address."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

"""One thread per process: tests start and fork processes, and a forked child of a multi-threaded torch can hang."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """Lightning's launchers leave MASTER_PORT behind; a later test's processes would all meet at that address."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

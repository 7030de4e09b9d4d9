"""One thread per process: tests start and fork processes, and a forked child of a multi-threaded torch can hang."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)

"""The allocator of runs on the CPU: freed memory is used again, without the system's help."""

import json
import subprocess
import sys

import pytest

from benchmarks.measuring import ROOT

PROGRAM = """
import resource, sys
from launch.allocator import keep_freed_memory
def pages(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(size)  # glibc maps what is over 32 MiB
    block[:] = b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print([pages(64 << 20) for _ in range(3)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("users", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["ours", "the user's"])
def test_memory_that_was_freed_is_not_asked_for_again(users):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=users, capture_output=True, text=True, check=True
    )
    first, *again = json.loads(done.stdout)
    assert (max(again) < 100) is not bool(users), (first, again)

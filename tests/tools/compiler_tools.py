"""What torch.compile has done: its graphs, counted from zero for each test, and what they returned."""

import pytest
import torch
import torch._dynamo.utils  # not loaded with torch
from torch.multiprocessing.reductions import StorageWeakRef

RETURNED: list[StorageWeakRef] = []
"""Memory of all outputs of graphs that the backend "recording" compiled."""


@pytest.fixture
def counted_compilation():
    """A compiler without graphs, which fails where it would give up and leave a network uncompiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    RETURNED.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def compiled_graphs() -> int:
    """Graphs so far; each compiled frame must be one, without a break.

    Raises:
        AssertionError: For a graph break.
    """
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    return counters["stats"]["unique_graphs"]


@torch._dynamo.register_backend
def recording(graph, inputs):
    """Run graphs as they are, as the backend "eager" does, and note the memory of their outputs."""

    def run(*arguments):
        outputs = graph(*arguments)
        RETURNED.extend(StorageWeakRef(output.untyped_storage()) for output in outputs)
        return outputs

    return run

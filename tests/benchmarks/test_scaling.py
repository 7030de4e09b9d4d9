"""The benchmark of two processes: what it measures and prints; not how fast anything is."""

import pytest
from test_benchmarks import assert_spread

from benchmarks import run, scaling
from benchmarks.cases import Case

TINY = Case(
    "digits, tiny",
    overrides=("batch_size=4", "teacher.weights=null", "teacher.sha256=null", "teacher.network.model_channels=8"),
    warmup=2,
    window=2,
    rounds=1,
)


def test_two_processes_are_put_beside_one():
    result = scaling.measure(TINY)
    for name in scaling.SETTINGS:
        assert_spread(result[f"{name}_step_seconds"], 1)
    single, weak = (result[f"{name}_step_seconds"]["median"] for name in ("single", "weak"))
    assert result["weak_over_single"]["median"] == pytest.approx(2 * single / weak)
    assert result["batch_size"] == 4
    network = 4 * result["parameters"]
    assert result["bytes_per_step"] == {"averaged": network, "ddp_find_unused_parameters_true": 2 * network}
    text = run.table(result)
    assert f"trainer.strategy=averaged: {network / 1e6:.4g} MB; ddp_find_unused_parameters_true: " in text
    assert "images/s of two over one, averaged" in text


def test_a_process_that_fails_is_no_figure():
    with pytest.raises(RuntimeError, match="a process of the benchmark failed, see above: Setting"):
        scaling.run(TINY, scaling.SETTINGS["single"], ("batch_size=0",))

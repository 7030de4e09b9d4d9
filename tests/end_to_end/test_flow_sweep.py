"""The sweep over Bezier curves that issue 5 asks for."""

import pytest
from end_to_end_tools import train, with_data
from flow_runs import write_run
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow  # many processes from the beginning


def test_every_curve_has_its_run(finished, tmp_path):
    """For debugging and with one teacher: nine runs, each in a folder of its own."""
    with_data(finished, tmp_path, "trajectories")
    write_run(tmp_path / "runs/flow", solver="euler", steps=3)
    sweep = ("-m", "method=bezier", "method.order=1,2,3", "method.slot=endpoint,trajectory,linear")
    small = ("trainer=debug", "callbacks=none", "method.pairs=64", "method.held_out=16", "evaluation.num_samples=10")
    train(tmp_path, *sweep, *small, "method.teachers=[runs/flow]").ok()
    runs = [path.parent for path in (tmp_path / "runs").glob("*/metrics.json")]
    methods = [OmegaConf.load(path / "config.yaml").method for path in runs]
    curves = {(order, slot) for order in (1, 2, 3) for slot in ("endpoint", "trajectory", "linear")}
    assert sorted((method.order, method.slot) for method in methods) == sorted(curves)
    assert all(path.name.startswith("bezier-digits-seed0-") for path in runs)

import json

import pytest
from convergence_tools import curve, decay, write_run

from metrics.cost import Priced, cost_rows, read_costs
from metrics.cost_picture import draw_cost
from metrics.curve import Cost


def test_a_preparation_costs_too(tmp_path):
    run = write_run(tmp_path / "run", curve("disback", decay(0.3, count=4), preparation=Cost(60, 2000, 7.5)))
    assert read_costs(run) == {"kimg": None, "seconds": 200 + 7.5, "network evaluations": None}  # 400 updates
    (run / "student.json").write_text(json.dumps({"kimg": 6.4, "network_evaluations": 9440.0}))
    assert read_costs(run) == {"kimg": 8.4, "seconds": 207.5, "network evaluations": 9440.0}
    (run / "metrics.csv").unlink()
    (run / "student.json").write_text("{")
    assert set(read_costs(run).values()) == {None}
    (run / "preparation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"preparation.json is damaged or lacks steps, images or seconds"):
        read_costs(run)


def priced(label, seed, value, seconds):
    return Priced(label, seed, value, {"kimg": 1.5, "seconds": seconds, "network evaluations": None})


RUNS = [priced("slow", 0, 0.2, 1000.0), priced("slow", 1, 0.4, 3000.0), priced("fast", 0, 0.5, 10.0)]


def test_rows_are_means_over_seeds():
    assert cost_rows(RUNS, "fid") == [
        ["group", "seeds", "fid", "kimg", "seconds", "network evaluations"],
        ["slow", "0, 1", "0.3", "1.5", "2,000", "–"],
        ["fast", "0", "0.5", "1.5", "10", "–"],
    ]


def test_the_picture_has_a_panel_for_each_cost_that_is_known(tmp_path):
    figure = draw_cost(tmp_path / "cost.png", "fid", RUNS)
    assert (tmp_path / "cost.png").exists()
    assert [axes.get_xlabel() for axes in figure.axes] == ["kimg of training", "seconds of training"]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
    means = {bar.get_label(): bar.lines[0].get_data() for bar in figure.axes[1].containers}
    assert {label: (x[0], y[0]) for label, (x, y) in means.items()} == {
        "slow": (2000.0, pytest.approx(0.3)),
        "fast": (10.0, 0.5),
    }

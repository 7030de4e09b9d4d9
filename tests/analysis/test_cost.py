import json

import pytest
from convergence_tools import curve, decay, write_run

from stillhouse.analysis.cost import RunCost, cost_rows, plot_cost, read_costs
from stillhouse.analysis.curves import Cost


def test_a_preparation_costs_too(tmp_path):
    run = write_run(tmp_path / "run", curve("disback", decay(0.3, count=4), preparation=Cost(60, 2000, 7.5)))
    assert read_costs(run) == {"kimg": None, "seconds": 200 + 7.5, "network evaluations": None}  # 400 updates
    (run / "student.json").write_text(json.dumps({"kimg": 6.4, "network_evaluations": 9440.0}))
    assert read_costs(run) == {"kimg": 8.4, "seconds": 207.5, "network evaluations": 9440.0}
    (run / "metrics.csv").unlink()
    (run / "student.json").unlink()
    assert set(read_costs(run).values()) == {None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("student.json", "{", r"student.json is damaged \(Expecting"),
        ("student.json", "[]", r"student.json is damaged \(it is 'no dict'\)"),
        ("student.json", '{"kimg": "48"}', "student.json is damaged \\(kimg is '48'"),
        ("student.json", '{"network_evaluations": NaN}', "student.json is damaged .network_evaluations is nan"),
        ("preparation.json", "{}", "preparation.json is damaged or lacks steps, images or seconds"),
        (
            "preparation.json",
            '{"steps": 1, "images": true, "seconds": 1}',
            "preparation.json is damaged .images is True",
        ),
        (
            "preparation.json",
            '{"steps": Infinity, "images": 1, "seconds": 1}',
            "preparation.json is damaged .steps is inf",
        ),
        ("metrics.csv", "step,nimg\n1,\0\n", "metrics.csv is damaged .it holds zero bytes"),
        ("metrics.csv", "step,loss\n1,2\n", "metrics.csv is damaged .it has no column nimg"),
        ("metrics.csv", "nimg,speed/training_seconds\n1,soon\n", "metrics.csv has speed/training_seconds 'soon'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_costs(tmp_path)


def test_a_link_out_of_the_run_is_not_followed(tmp_path):
    (tmp_path / "secret.json").write_text('{"kimg": 1}')
    run = tmp_path / "run"
    (run / "kept").mkdir(parents=True)
    (run / "student.json").symlink_to("../secret.json")
    with pytest.raises(ValueError, match="student.json is a link that leads out of .*run, which is not followed"):
        read_costs(run)
    (run / "student.json").unlink()
    (run / "kept/student.json").write_text('{"kimg": 1}')
    (run / "student.json").symlink_to("kept/student.json")
    (tmp_path / "linked").symlink_to("run")  # the run itself may lie elsewhere
    assert read_costs(tmp_path / "linked")["kimg"] == 1


def priced(label, seed, value, seconds):
    return RunCost(label, seed, value, {"kimg": 1.5, "seconds": seconds, "network evaluations": None})


RUNS = [priced("slow", 0, 0.2, 1000.0), priced("slow", 1, 0.4, 3000.0), priced("fast", 0, 0.5, 10.0)]


def test_rows_have_the_mean_of_the_metric_and_the_range_of_the_costs_over_seeds():
    assert cost_rows(RUNS, "fid") == [
        ["group", "seeds", "fid", "kimg", "seconds", "network evaluations"],
        ["slow", "0, 1", "0.3", "1.5", "1,000 .. 3,000", "–"],
        ["fast", "0", "0.5", "1.5", "10", "–"],
    ]


def test_the_picture_has_a_panel_for_each_cost_that_is_known(tmp_path):
    figure = plot_cost(tmp_path / "cost.png", "fid", RUNS)
    assert (tmp_path / "cost.png").exists()
    assert [axes.get_xlabel() for axes in figure.axes] == ["kimg of training", "seconds of training"]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
    means = {bar.get_label(): bar.lines[0].get_data() for bar in figure.axes[1].containers}
    assert {label: (x[0], y[0]) for label, (x, y) in means.items()} == {
        "slow": (2000.0, pytest.approx(0.3)),
        "fast": (10.0, 0.5),
    }

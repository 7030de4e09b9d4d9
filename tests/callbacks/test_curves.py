"""curves.png has one line per column and per reference."""

import pytest
from matplotlib.image import imread
from tiny_module import TinyMethod, trainer

from callbacks.curves import Curves, plot_curves
from callbacks.generative_metrics import GenerativeMetrics
from callbacks.loggers.csv_logger import CSVLogger
from stillhouse.analysis.curves import reference_lines
from stillhouse.metrics.records import Record, save_records

TABLE = """step,nimg,loss/student,heldout/loss,fid/ema_0.9,fid/raw,speed/images_per_second,kid_1k/ema_0.9
1,1000,0.5,,,,100,
2,2000,0.25,0.3,12.5,20.5,100,0.1
3,3000,0.125,0.2,10.5,,100,
"""


def write(folder, text=TABLE):
    (folder / "metrics.csv").write_text(text)
    return folder / "metrics.csv"


def test_panels_lines_and_values(tmp_path):
    figure = plot_curves(write(tmp_path), tmp_path / "curves.png", {"fid": {"teacher (18 NFE)": 9.0, "real": 1.0}})
    panels = {axes.get_title(): axes for axes in figure.axes}
    lines = {title: {line.get_label(): line for line in axes.lines} for title, axes in panels.items()}
    assert {title: sorted(labels) for title, labels in lines.items()} == {
        "loss": ["heldout/loss", "loss/student"],
        "fid": ["fid/ema_0.9", "fid/raw", "real", "teacher (18 NFE)"],
        "kid_1k": ["kid_1k/ema_0.9"],
    }
    assert panels["loss"].get_yscale() == "log"
    assert panels["fid"].get_yscale() == "linear"
    assert panels["fid"].get_xlabel() == "kimg"
    assert list(lines["loss"]["heldout/loss"].get_xdata()) == [2, 3]
    assert list(lines["fid"]["fid/ema_0.9"].get_ydata()) == [12.5, 10.5]
    assert list(lines["fid"]["real"].get_ydata()) == [1, 1]
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[1] > 2 * picture.shape[0]
    assert picture.std() > 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


@pytest.mark.parametrize(
    "text", ["step,nimg\n", "step,nimg,loss\n1,1000,nan\n", "step,nimg,loss\n1,1000,-1\n2,2000,inf\n"]
)
def test_odd_tables_are_drawn_too(tmp_path, text):
    plot_curves(write(tmp_path, text), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_loss_of_both_signs_is_drawn_whole(tmp_path):
    figure = plot_curves(write(tmp_path, TABLE.replace("0.25", "-0.25")), tmp_path / "curves.png")
    assert figure.axes[0].get_yscale() == "symlog"


def test_reference_lines_come_from_the_records(tmp_path):
    def record(subject, nfe, mean, num_samples=2000):
        samples = {"num_samples": num_samples}
        return Record("digits", "fid_digits", subject, nfe, mean, None, [mean], None, fingerprint=samples)

    records = [
        record("teacher", 18, 2.5),
        record("teacher", 1, 90.0),
        record("real", 0, 0.5),
        record("student", 1, 3.5),
    ]
    save_records(tmp_path / "metrics.json", [*records, record("teacher", 18, 2.25, num_samples=500)])
    assert reference_lines(tmp_path / "metrics.json") == {
        "fid_digits_2k": {"teacher (18 NFE)": 2.5, "teacher (1 NFE)": 90.0, "real": 0.5},
        "fid_digits_500": {"teacher (18 NFE)": 2.25},
    }
    assert reference_lines(tmp_path / "none.json") == {}


def test_a_run_leaves_its_curves(tmp_path):
    trainer(tmp_path, 4, [Curves()], validate_every=2, logger=CSVLogger(tmp_path, 4)).fit(TinyMethod())
    assert (tmp_path / "curves.png").stat().st_size > 1000
    trainer(tmp_path / "unlogged", 2, [Curves()]).fit(TinyMethod())  # no metrics.csv: nothing to draw
    assert not (tmp_path / "unlogged/curves.png").exists()


def test_curves_follow_the_evaluations(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("callbacks.curves.plot_curves", lambda *args: drawn.append(t.global_step))
    monkeypatch.setattr(GenerativeMetrics, "on_fit_start", lambda *args: None)
    monkeypatch.setattr(GenerativeMetrics, "evaluate", lambda *args: {"fid_9/raw": 1.0})
    callbacks = [GenerativeMetrics(0.2, 10, None), Curves()]
    t = trainer(tmp_path, 6, callbacks, logger=CSVLogger(tmp_path, 100))
    t.fit(TinyMethod(batch_size=100))
    assert drawn == [2, 4, 6]

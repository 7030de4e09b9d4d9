import numpy as np
import pytest
from convergence_tools import BATCH, curve, decay
from matplotlib.image import imread

from stillhouse.analysis.convergence import Comparison
from stillhouse.analysis.convergence_plot import curves_on_common_axis, plot_convergence
from stillhouse.analysis.curves import Cost

BASE = [curve("base", decay(0.1), seed=s, pace=0.5 + 0.1 * s) for s in range(3)]
FAST = curve("fast", decay(0.4), preparation=Cost(600, 9600, 12.5))


def test_panels_lines_and_legend(tmp_path):
    path = tmp_path / "comparison/convergence.png"
    figure = plot_convergence(path, Comparison((*BASE, FAST), "base"), {"teacher (19 NFE)": 0.01})
    assert [axes.get_xlabel() for axes in figure.axes] == ["updates of the student", "kimg", "seconds of training"]
    assert figure.axes[0].get_ylabel() == "fid_digits_2k, trailing median of 3"
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    labels = [
        "base, 3 seeds",
        "fast",
        "fast, with its preparation",
        "best of base, times 1, 1.05, 1.2",
        "teacher (19 NFE)",
    ]
    for axes, shift in zip(figure.axes, (600, 9.6, 12.5), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert [label for label in lines if not label.startswith("_")] == labels
        fast, shifted = lines["fast"], lines["fast, with its preparation"]
        assert shifted.get_xdata() == pytest.approx(fast.get_xdata() + shift)
        assert list(shifted.get_ydata()) == list(fast.get_ydata()) == list(FAST.smoothed[1:])
        assert len(axes.collections) == 1 + 3 + 1  # the band of three seeds, and the dots of four runs
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    picture = imread(path)
    assert picture.shape[1] > 2 * picture.shape[0]
    assert picture.std() > 0.05
    assert [p.name for p in path.parent.iterdir()] == ["convergence.png"]


def test_one_group_has_no_thresholds_and_a_narrow_range_is_linear(tmp_path):
    figure = plot_convergence(tmp_path / "c.png", Comparison((curve("base", [2.0, 1.5, 1.0]),), "base"))
    assert all(axes.get_yscale() == "linear" for axes in figure.axes)
    assert [line.get_label() for line in figure.axes[0].lines] == ["base"]
    negative = Comparison((curve("base", [9.0, 1.0, -0.1]),), "base")  # rounding of a distance near zero
    assert plot_convergence(tmp_path / "c.png", negative).axes[0].get_yscale() == "linear"


def test_seeds_measured_at_other_places_are_interpolated():
    curves = [curve("a", [4.0, 4, 3, 2, 1], every=2), curve("a", [9.0, 9, 6, 3], every=3, seed=1)]
    places, values = curves_on_common_axis(curves, 0)
    assert list(places) == [6, 8, 9, 10]  # from 4 and 6 on, to 10 and 12
    assert values == pytest.approx(np.array([[4, 3, 2.5, 2], [9, 9, 9, 8]]))
    assert list(curves_on_common_axis(curves, 1)[0]) == [BATCH * p for p in places]


def test_seconds_are_the_median_of_each_measurement():
    places, values = curves_on_common_axis(BASE, 2)
    assert places == pytest.approx([60 * (i + 1) for i in range(1, 30)])  # 0.6 seconds an update
    assert values.shape == (3, 29)

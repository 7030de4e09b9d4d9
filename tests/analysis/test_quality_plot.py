import numpy as np
from matplotlib.image import imread

from stillhouse.analysis.quality import QualityLine, QualityPoint
from stillhouse.analysis.quality_plot import plot_quality

SFD = QualityLine(
    "sfd", tuple(QualityPoint(n, m, s, (0, 1, 2)) for n, m, s in [(1, 0.5, 0.1), (2, 0.3, 0.05), (4, 0.2, 0.01)])
)
PD = QualityLine("progressive", tuple(QualityPoint(n, m, None, (0,)) for n, m in [(1, 0.6), (2, 0.35), (8, 0.22)]))
HEUN = QualityLine("teacher digits (heun)", (QualityPoint(19, 0.16),), teacher=True)
EULER = QualityLine("teacher digits (euler)", (QualityPoint(4, 2.5), QualityPoint(8, 0.9)), teacher=True)


def test_axes_lines_and_legend(tmp_path):
    path = tmp_path / "comparison/quality.png"
    figure = plot_quality(path, "fid_digits", [SFD, PD, HEUN, EULER], floor=0.1)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(axes.get_xticks()) == [1, 2, 4, 8, 19]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8", "19"]
    assert axes.get_ylabel() == "fid_digits"
    assert axes.get_title() == "bars: standard deviation over training seeds"
    (legend,) = figure.legends
    labels = ["sfd, 3 seeds", "progressive", "teacher digits (heun)", "teacher digits (euler)", "real images"]
    assert [text.get_text() for text in legend.get_texts()] == labels
    points, caps, (bars,) = axes.containers[0]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([1, 2, 4], [0.5, 0.3, 0.2])
    np.testing.assert_allclose(bars.get_segments()[0], [[1, 0.4], [1, 0.6]])
    assert len(caps) == 2
    assert not any(s.size for s in axes.containers[1][2][0].get_segments())  # no bar where there is no spread
    picture = imread(path)
    assert picture.shape[:2] == (600, 840)
    assert picture[..., :3].std() > 0.05
    assert [p.name for p in path.parent.iterdir()] == ["quality.png"]


def test_a_narrow_range_is_linear_and_without_bars_nothing_is_said_of_them(tmp_path):
    (axes,) = plot_quality(tmp_path / "q.png", "fid", [PD]).axes
    assert axes.get_yscale() == "linear"
    assert axes.get_title() == ""
    low = QualityLine("low", (QualityPoint(1, 9.0), QualityPoint(2, -0.1)))  # rounding of a distance near zero
    assert plot_quality(tmp_path / "q.png", "fid", [low]).axes[0].get_yscale() == "linear"


def test_students_of_one_number_of_evaluations_stand_one_below_the_other(tmp_path):
    one, other = (
        QualityLine("guided", (QualityPoint(1, 0.2, 0.02, (0, 1)),)),
        QualityLine("straight", (QualityPoint(1, 0.3, 0.01, (0, 1)),)),
    )
    figure = plot_quality(tmp_path / "q.png", "fid_digits", [one, other, HEUN], floor=0.1)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["guided", "straight"]
    assert axes.get_xlabel() == "fid_digits, 1 NFE"
    assert [list(container[0].get_xdata()) for container in axes.containers] == [[0.2], [0.3]]
    assert [list(container[0].get_ydata()) for container in axes.containers] == [[0], [1]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["teacher digits (heun), 19 NFE", "real images"]
    assert imread(tmp_path / "q.png")[..., :3].std() > 0.05

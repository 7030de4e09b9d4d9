import dataclasses

import numpy as np
import pytest
import torch
from flow_chain_tools import chain
from matplotlib.image import imread

from stillhouse.analysis.flow_plot import plot_flow_chain
from stillhouse.pictures.paths import PathPanel, bezier_panel, coupling_panel, plot_paths


def lines(axes):
    """{label: y values}"""
    return {c.get_label(): list(c.lines[0].get_ydata()) for c in axes.containers}


def test_panels_lines_and_legend(tmp_path):
    figure = plot_flow_chain(tmp_path / "flows/flows.png", chain())
    drift, bend, fid = figure.axes
    assert lines(drift) == {"roots of step drifts, added up": [0, 2, 3], "root of the end-point drift": [0, 2, 2.5]}
    assert lines(bend) == {"straightness S": [3.0, 0.5, 0.2]}
    assert lines(fid) == {
        "whole simulation": [0.2, 0.3, 0.4],
        "1 Euler step": [20.0, 0.8, 0.6],
        "flow_distill": [pytest.approx(0.45), 0.6],
        "bezier": [0.55],
    }
    assert list(fid.containers[2].lines[0].get_xdata()) == [2, 3]
    assert fid.get_yscale() == "log"
    assert [label.get_text() for label in fid.get_xticklabels()] == ["1\nrf1", "2\nrf2", "3\nrf3"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 8
    assert imread(tmp_path / "flows/flows.png")[..., :3].std() > 0.05
    assert [p.name for p in (tmp_path / "flows").iterdir()] == ["flows.png"]


def test_one_flow_alone_and_long_names(tmp_path):
    first = dataclasses.replace(chain().flows[0], name="reflow-eight_gaussians-seed0")
    one = dataclasses.replace(chain(), flows=(first,), distilled=())
    (tick,) = plot_flow_chain(tmp_path / "flows.png", one).axes[0].get_xticklabels()
    assert max(map(len, tick.get_text().splitlines())) <= 14


def test_paths_share_their_limits_and_axes_are_equal(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise, images = (torch.randn(9, 2, 1, 1, generator=generator) for _ in range(2))
    straight = coupling_panel("pairs", noise, images, torch.zeros(3, 2))
    control = torch.stack([noise, images + 100, images], 1).double()  # its inner points may lie far outside
    bent = bezier_panel("curves", control)
    figure = plot_paths(tmp_path / "paths.png", [straight, bent, straight._replace(title="again"), *[straight] * 2])
    axes = figure.axes
    assert [a.get_title() for a in axes[:3]] == ["pairs", "curves", "again"]
    assert len(axes) == 6
    assert len({a.get_xlim() for a in axes[:5]}) == len({a.get_ylim() for a in axes[:5]}) == 1
    assert all(a.get_aspect() == 1 for a in axes[:5])
    assert not axes[5].axison
    np.testing.assert_allclose(straight.curves[:, 1], images[:, :, 0, 0])
    torch.testing.assert_close(bent.curves[:, [0, -1]], torch.stack([bent.starts, bent.ends], 1))
    assert bent.marks.shape == (9, 2)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["data", "noise", "end points", "control points"]
    with pytest.raises(ValueError, match="at least one panel"):
        plot_paths(tmp_path / "none.png", [])


def test_a_straight_bezier_curve_has_no_marks():
    control = torch.randn(4, 2, 2, 1, 1)
    assert bezier_panel("straight", control).marks is None
    assert isinstance(bezier_panel("straight", control), PathPanel)

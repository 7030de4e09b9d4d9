"""What plots have in common: a logarithmic axis where it helps, a legend below, a file written whole or not at all."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.files import write_file

if TYPE_CHECKING:  # training does without it until something is plotted
    import matplotlib.axes
    import matplotlib.figure

_LOG_SPAN = 5
_LEGEND_ROWS, _LEGEND_ROW = 5, 0.21  # rows for which a figure has room; inches that each further one takes


def log_scale(axes: "matplotlib.axes.Axes", values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with plain numbers, if the values are positive and span more than a factor of 5."""
    if min(values) > 0 and max(values) > _LOG_SPAN * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "")


def legend_below(
    figure: "matplotlib.figure.Figure", handles: Sequence[Any], labels: Sequence[str], letters: int
) -> None:
    """Put a legend below the panels, in as many columns as fit, for which the figure grows.

    Args:
        figure: With its panels.
        handles: Of what is named.
        labels: Its names.
        letters: In a line as wide as the figure.
    """
    columns = min(len(labels), max(1, letters // (8 + max(map(len, labels)))))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, -(-len(labels) // columns) - _LEGEND_ROWS))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: "matplotlib.figure.Figure", path: str | Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getvalue())

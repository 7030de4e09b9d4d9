"""A comparison of quality against NFE as text: a row for every group and teacher, a column for every NFE."""

from stillhouse.analysis.quality import Line, Point, Quality
from stillhouse.analysis.tables import aligned, fingerprint_line, piped, shown


def text(quality: Quality) -> str:
    """Aligned plain text under one line, then the fingerprint and notes."""
    lines = [quality_heading(quality), *aligned(quality_rows(quality)), fingerprint_line(quality.fingerprint)]
    return "\n\n".join(["\n".join(lines), *(f"note: {note}" for note in quality.notes)])


def markdown(quality: Quality) -> str:
    """The same for a README."""
    parts = [quality_heading(quality), "\n".join(piped(quality_rows(quality))), fingerprint_line(quality.fingerprint)]
    notes = "\n".join(f"- {note}" for note in quality.notes)
    return "\n\n".join([*parts, *([notes] if notes else [])])


def quality_heading(quality: Quality) -> str:
    copies = ", ".join(dict.fromkeys(value.weights for value in quality.values if value.weights))
    spread = any(point.std is not None for line in quality.lines for point in line.points)
    mean = "mean ± standard deviation over training seeds" if spread else "one training seed each"
    floor = "" if quality.floor is None else f"; real images score {quality.floor:.4g}"
    return f"{quality.metric} against NFE ({copies}): {mean}{floor}"


def quality_rows(quality: Quality) -> list[list[str]]:
    """Nothing is marked as best: with a few seeds that would say more than the numbers do."""
    body = []
    for line in quality.lines:
        seeds = sorted({seed for point in line.points for seed in point.seeds})
        points = {point.nfe: point for point in line.points}
        cells = [_cell(points[nfe], line, seeds) if nfe in points else "–" for nfe in quality.counts]
        body.append([line.label, ", ".join(map(str, seeds)) or "–", *cells])
    return [["group", "seeds", *(f"{nfe} NFE" for nfe in quality.counts)], *body]


def _cell(point: Point, line: Line, seeds: list[int]) -> str:
    """0.209 ± 0.012, and which seeds are behind it where those are not all of the row's."""
    fewer = "" if line.teacher or list(point.seeds) == seeds else f" (seed {', '.join(map(str, point.seeds))})"
    return f"{shown(point.mean, point.std)}{fewer}"

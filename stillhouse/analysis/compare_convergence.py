"""Run folders to a comparison of their convergence."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from stillhouse.analysis.config_groups import (
    ComparableOptions,
    compared_options,
    labels,
    measuring_difference,
    other_differences,
)
from stillhouse.analysis.convergence import Comparison, convergence_text, convergence_to_json
from stillhouse.analysis.convergence_plot import plot_convergence
from stillhouse.analysis.curves import Curve, read_curve, reference_lines
from stillhouse.analysis.stored_runs import StoredRun
from stillhouse.files import resolve_inside, write_ordered_json
from stillhouse.metrics.provenance import student_provenance


def compare_runs(runs: Sequence[StoredRun], *, metric: str | None = None, weights: str | None = None) -> Comparison:
    """Compare the runs' curves; the first run's group is the baseline, and the notes say which runs are left out.

    Args:
        runs: Folders of runs.
        metric: Such as fid_digits_2k (None: that of the first curve).
        weights: As for `read_curve`.

    Raises:
        ValueError: Where no run, or none of the baseline, has a curve.
    """
    configs = [run.plain_config() for run in runs]
    options_of_runs = compared_options(configs)
    groups = labels(options_of_runs)
    curves: dict[tuple[str, int], Curve] = {}
    left_out: list[str] = []
    for run, config, options, group in zip(runs, configs, options_of_runs, groups, strict=True):
        try:
            seed = config.get("seed", 0)
            _check(run, options_of_runs[0], options, curves.get((group, seed)))
            curve = read_curve(run.path, group, seed, metric=metric, weights=weights)
            curve = replace(curve, provenance=student_provenance(run.final_records()))
        except (ValueError, OSError) as error:
            left_out.append(f"{run.path} left out of the comparison: {error}")
            continue
        metric = curve.metric
        curves[group, seed] = curve
    if groups[0] not in (group for group, _ in curves):
        raise ValueError("\n".join([f"no curve of the baseline {groups[0]}", *left_out]))
    notes = [*_differences(groups, options_of_runs, {group for group, _ in curves}), *left_out]
    return Comparison(tuple(curves.values()), groups[0], tuple(notes))


def _check(run: StoredRun, first: ComparableOptions, options: ComparableOptions, twin: Curve | None) -> None:
    """Check that a run's curve may stand beside those of the first one's group.

    Raises:
        ValueError: For a run whose curve should not stand beside those of the first one's group.
    """
    run.check_complete()
    if key := measuring_difference(first, options):
        raise ValueError(f"its {key} is {options.get(key)}, but the first run's is {first.get(key)}")
    if twin is not None:
        raise ValueError(f"it has the configuration and the seed of {twin.name}")


def _differences(groups: Sequence[str], options_of_runs: Sequence[ComparableOptions], present: set[str]) -> list[str]:
    """A note for every group of another method whose common options differ from the baseline's."""
    notes = []
    for group, options in dict(zip(groups, options_of_runs, strict=True)).items():
        others = other_differences(options_of_runs[0], options)
        if group in present and options.get("method.name") != options_of_runs[0].get("method.name") and others:
            notes.append(f"{group} differs from {groups[0]} in options that both have: {'; '.join(others)}")
    return notes


def write_convergence(runs: Sequence[StoredRun], folder: Path, *, weights: str | None = None) -> str:
    """Write convergence.json and convergence.png into `folder`.

    Args:
        runs: Folders of runs.
        folder: The place of the files.
        weights: As for `read_curve`.

    Returns:
        The tables, or why there are none.
    """
    try:
        comparison = compare_runs(runs, weights=weights)
    except ValueError as error:
        return f"convergence not compared: {error}"
    write_ordered_json(folder / "convergence.json", convergence_to_json(comparison))
    draw_convergence(folder / "convergence.png", comparison, runs)
    return f"{convergence_text(comparison)}\n\n{folder}/convergence.json and convergence.png written"


def draw_convergence(path: Path, comparison: Comparison, runs: Sequence[StoredRun]) -> None:
    """Draw the curves of `runs` into `path`, with the teacher's value on the seeds of the curves."""
    lines: dict[str, float] = {}
    for run in reversed(runs):
        with suppress(ValueError, OSError):  # of a run that is left out
            lines |= reference_lines(resolve_inside(run.path, run.monitoring.name)).get(comparison.metric, {})
    plot_convergence(path, comparison, {k: v for k, v in lines.items() if k.startswith("teacher")})

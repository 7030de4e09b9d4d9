"""The papers' claims beside what the runs of `python -m benchmarks.evidence` measured: rows for each, and their tables.

A claim without runs has no row. Where several seeds were trained, they are compared in pairs of the same seed.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.evidence.claims import (
    B_DENSE,
    BEZIER,
    CLAIMS,
    DISBACK,
    FAKE_UPDATES,
    PATHS,
    ROUND_STEPS,
    SFD_STEPS,
    SIGMAS,
    STUDENT,
)
from results.trained import TrainedRuns
from stillhouse.analysis.convergence import FACTORS, Comparison, format_speed_up
from stillhouse.analysis.cost import COST_NAMES, format_cost
from stillhouse.analysis.curves import Curve
from stillhouse.analysis.tables import describe_fingerprint, format_mean_std, markdown_table
from stillhouse.metrics.provenance import short_revision

HOLDS, FAILS, PARTLY = "yes", "no", "in part"
# The paper's own distance over its teacher's, on CIFAR-10: what "near" means here.
_NEAR = 9.36 / 4.16
_HOSTS = {
    "SFD": tuple((f"sfd-{n}", f"b_dense_sfd-{n}", n) for n in sorted(SFD_STEPS)),
    "progressive distillation": tuple(("progressive", "b_dense_progressive", n) for n in ROUND_STEPS),
    "Denoising Student": (("denoising_student", "b_dense_student", 1),),
}
_CONTROLS = {
    "distilled 2-RF": "flow_distill-rf2",
    "distilled 1-RF": "flow_distill-rf1",
    "ends of both flows without a curve": "bezier-order1",
    "2-RF itself": "reflow",
}


_SEEDS = "seeds of each"  # of the methods that a row compares


@dataclass(frozen=True)
class Row:
    """One claim in one setting.

    Attributes:
        claim: Of `CLAIMS`.
        setting: Of the runs.
        measured: What was found, in words and numbers.
        holds: `HOLDS`, `FAILS` or `PARTLY`, by the criterion.
        criterion: When it would hold.
        seeds: Of each of the methods.
        costs: Of each method's training, for each seed.
    """

    claim: str
    setting: str
    measured: str
    holds: str
    criterion: str
    seeds: tuple[int, ...]
    costs: dict[str, list[dict[str, float | None]]]


def claim_rows(runs: TrainedRuns) -> list[Row]:
    """The claims that have runs, each setting in a row."""
    return [*_student(runs), *_disback(runs), *_b_dense(runs), *_bezier(runs)]


def claims_markdown(runs: TrainedRuns) -> str:
    """The table of the claims, with costs and criteria below it."""
    rows = claim_rows(runs)
    said = [
        f"- **{_title_of(claim.name)}**: {claim.paper}." for claim in CLAIMS if claim.name in {r.claim for r in rows}
    ]
    body = [[_title(row), row.measured, row.holds, _listed(row.seeds)] for row in rows]
    criteria = dict.fromkeys(f"- {_title_of(row.claim)} holds where {row.criterion}." for row in rows)
    costs = [
        [_title(row), name, *(format_cost([each[cost] for each in costs]) for cost in COST_NAMES)]
        for row in rows
        for name, costs in row.costs.items()
    ]
    revisions = dict.fromkeys(short_revision((record.provenance or {}).get("revision")) for record in runs.records)
    return "\n\n".join(
        [
            "\n".join(["The papers say:", "", *said]),
            f"{runs.metric} of {runs.data}, mean ± standard deviation over training seeds:",
            "\n".join(markdown_table([["claim", "measured", "holds", _SEEDS], *body])),
            "\n".join(criteria),
            describe_fingerprint(runs.fingerprint),
            f"Commits of the runs: {', '.join(revisions)}.",
            "What a training cost, its preparation included, least .. greatest over the seeds (seconds beside other runs on the "
            "same device):",
            "\n".join(markdown_table([["claim", "method", *COST_NAMES], *costs])),
        ]
    )


def claims_summary(runs: TrainedRuns) -> str:
    """In how many settings each claim holds, as the README has it."""
    by_claim: dict[str, list[Row]] = {}
    for row in claim_rows(runs):
        by_claim.setdefault(row.claim, []).append(row)
    body = []
    for claim in CLAIMS:
        if rows := by_claim.get(claim.name):
            holds = f"{sum(row.holds == HOLDS for row in rows)} of {len(rows)}"
            body.append([_title_of(claim.name), claim.paper, holds, _seeds_of(rows)])
    return "\n".join(markdown_table([["method", "its paper's claim", "settings in which it holds", _SEEDS], *body]))


def _seeds_of(rows: Sequence[Row]) -> str:
    """Those of every setting: 0, 1, 2, or 0, 1, 2 (in 1 of 7); 0 (in 6 of 7)."""
    counts = Counter(_listed(row.seeds) for row in rows)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{seeds} (in {count} of {len(rows)})" for seeds, count in counts.items())


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _title_of(claim: str) -> str:
    return {STUDENT: "Denoising Student", DISBACK: "DisBack", B_DENSE: "B-DENSE", BEZIER: "Bézier distillation"}[claim]


def _title(row: Row) -> str:
    return f"{_title_of(row.claim)}, {row.setting}"


def _student(runs: TrainedRuns) -> list[Row]:
    name = "denoising_student"
    ratios, faster, seeds, counts = [], [], [], set()
    for seed in runs.seeds(name):
        run = runs.run(name, seed)
        student, teacher = run.record(1), run.record(max((r.nfe for r in run.values), default=0), "teacher")
        if student and teacher:
            seeds.append(seed)
            counts.add(teacher.nfe)
            ratios.append(student.mean / teacher.mean)
            if student.images_per_second and teacher.images_per_second:
                faster.append(student.images_per_second / teacher.images_per_second)
    if not seeds:
        return []
    nfe = max(counts)
    student = [runs.run(name, seed).record(1) for seed in seeds]
    teacher = runs.run(name, seeds[0]).record(nfe, "teacher")
    text = (
        f"{_spread([r.mean for r in student])} in 1 evaluation, the teacher {teacher.mean:.4g} in {nfe}: "
        f"{statistics.fmean(ratios):.3g} times the distance"
    )
    if faster:
        samples = student[0].fingerprint["num_samples"]
        took = [samples / statistics.median(r.images_per_second for r in records) for records in (student, [teacher])]
        text += f"; {samples:,} images in {took[0]:.3g} s and {took[1]:.3g} s, {statistics.median(faster):.3g} times as fast"
    criterion = (
        f"the student's distance is at most {_NEAR:.3g} times the teacher's, as in the paper on CIFAR-10, at every seed"
    )
    holds = _all([ratio <= _NEAR for ratio in ratios])
    costs = {name: runs.costs(name, seeds)}
    setting = runs.run(name, seeds[0]).options["loss"].upper()
    return [Row(STUDENT, setting, text, holds, criterion, tuple(seeds), costs)]


def _disback(runs: TrainedRuns) -> list[Row]:
    settings = [
        (
            f"diff_instruct-{ending}",
            f"disback-{ending}",
            f"sigma_init {sigma}, {updates} fake-score update{'s' * (updates > 1)}",
        )
        for updates in FAKE_UPDATES
        for sigma in SIGMAS
        for ending in [f"sigma{sigma}-fake{updates}"]
    ]
    base, path, title = settings[0]
    settings += [(base, f"{path}-{name}", title) for name in PATHS]
    rows = []
    for baseline, method, setting in settings:
        if not (seeds := runs.seeds(baseline, method)):
            continue
        curves = [runs.curves(name, seeds, 1) for name in (baseline, method)]
        if None in curves:
            continue
        comparison = Comparison((*curves[0], *curves[1]), baseline)
        speeds = {factor: comparison.speed_up(method, factor, "images", prepared=True) for factor in FACTORS}
        found = [f"{format_speed_up(speed)} to {comparison.thresholds[factor]:.3g}" for factor, speed in speeds.items()]
        options = runs.run(method, seeds[0]).options
        nodes = f"{options['nodes']} node{'s' * (options['nodes'] > 1)}"
        setting = f"{setting} ({nodes} of {options['interval']} updates)"
        criterion = "with stage 1 it needs fewer images than Diff-Instruct to the latter's best distance, 1.05 and 1.2 times that"
        holds = _all([(speed.median or 0) > 1 for speed in speeds.values()])
        costs = {name.partition("-")[0]: runs.costs(name, seeds) for name in (baseline, method)}
        text = f"times fewer images: {', '.join(found)}"
        rows.append(Row(DISBACK, setting, text, holds, criterion, seeds, costs))
    return rows


def _b_dense(runs: TrainedRuns) -> list[Row]:
    criterion = "its distance is below its host's at every seed"
    rows = []
    for host, pairs in _HOSTS.items():
        for base, branched, nfe in pairs:
            seeds = runs.seeds(base, branched)
            theirs, ours = (runs.means(name, seeds, nfe) for name in (base, branched))
            if theirs is None or ours is None:
                continue
            text = f"{_spread(ours)} against {_spread(theirs)}"
            if moment := _largest_lead(runs.curves(base, seeds, nfe), runs.curves(branched, seeds, nfe)):
                text += f"; {moment}"
            holds = _all([a < b for a, b in zip(ours, theirs, strict=True)])
            costs = {name: runs.costs(name, seeds) for name in (base, branched)}
            rows.append(Row(B_DENSE, f"on {host}, {nfe} NFE", text, holds, criterion, seeds, costs))
    return rows


def _largest_lead(base: list[Curve] | None, branched: list[Curve] | None) -> str | None:
    """After how many images the host's mean curve was furthest above the other one; None without curves at the same places."""
    if base is None or branched is None:
        return None
    places = [[cost.images for cost in curve.costs] for curve in (*base, *branched)]
    if any(place != places[0] for place in places):
        return None
    theirs, ours = (
        [statistics.fmean(values) for values in zip(*(curve.values for curve in curves), strict=True)]
        for curves in (base, branched)
    )
    gaps = [a - b for a, b in zip(theirs, ours, strict=True)]
    index = max(range(len(gaps)), key=gaps.__getitem__)
    if gaps[index] <= 0:
        return "never ahead on the way"
    return f"largest lead {gaps[index]:.3g} at {places[0][index] / 1000:.4g} of {places[0][-1] / 1000:.4g} kimg"


def _bezier(runs: TrainedRuns) -> list[Row]:
    name = "bezier"
    controls = {label: control for label, control in _CONTROLS.items() if runs.seeds(name, control)}
    distilled = [controls[label] for label in controls if controls[label].startswith("flow_distill")]
    seeds = runs.seeds(name, *controls.values())
    ours = runs.means(name, seeds, 1) if distilled else None
    if ours is None:
        return []
    theirs = {label: runs.means(control, seeds, 1) for label, control in controls.items()}
    texts = [f"1 NFE: {_spread(ours)}", *(f"{label} {_spread(v)}" for label, v in theirs.items() if v)]
    for label, control in controls.items():
        trained = f"{control}-2" if control in distilled else control
        trained_seeds = runs.seeds(trained)
        if values := runs.means(trained, trained_seeds, 2):
            others = "" if trained_seeds == seeds else f" (seed {_listed(trained_seeds)})"
            texts.append(f"2 NFE: {label} {_spread(values)}{others}")
    best = [min(runs.run(control, seed).record(1).mean for control in distilled) for seed in seeds]
    holds = _all([a < b for a, b in zip(ours, best, strict=True)])
    criterion = "its distance in one evaluation is below the best distilled flow's, at every seed"
    costs = {each: runs.costs(each, seeds) for each in (name, *controls.values())}
    setting = f"order {runs.run(name, seeds[0]).options['order']}, 1-RF and 2-RF"
    return [Row(BEZIER, setting, ", ".join(texts), holds, criterion, seeds, costs)]


def _all(outcomes: Sequence[bool]) -> str:
    return HOLDS if all(outcomes) else PARTLY if any(outcomes) else FAILS


def _spread(values: Sequence[float]) -> str:
    return format_mean_std(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

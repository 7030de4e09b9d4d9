"""The papers' claims beside what the runs of `python -m benchmarks.evidence` measured: a row for each, and their tables.

A claim without runs has no row. Where several seeds were trained, they are compared in pairs of the same seed.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from benchmarks.evidence.jobs import folder_of
from launch.run.folder import RunFolder
from stillhouse.analysis.compare_convergence import compare_runs
from stillhouse.analysis.convergence import FACTORS, format_speed_up
from stillhouse.analysis.cost import COST_NAMES, format_cost, read_costs
from stillhouse.analysis.curves import Curve, read_curve
from stillhouse.analysis.tables import describe_fingerprint, format_mean_std, markdown_table
from stillhouse.metrics.records import Record

HOLDS, FAILS, PARTLY = "yes", "no", "in part"
# The paper's own distance over its teacher's, on CIFAR-10: what "near" means here.
_NEAR = 9.36 / 4.16
_SEEDS = range(100)  # those from 100 on are for tuning
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


@dataclass(frozen=True)
class Row:
    """One claim in one setting.

    Attributes:
        claim: Of `CLAIMS`.
        setting: Of the runs.
        measured: What was found, in words and numbers.
        holds: `HOLDS`, `FAILS` or `PARTLY`, by the criterion.
        criterion: When it would hold.
        seeds: Behind it.
        costs: Of each method's training, a mean over the seeds.
    """

    claim: str
    setting: str
    measured: str
    holds: str
    criterion: str
    seeds: tuple[int, ...]
    costs: dict[str, dict[str, float | None]]


class Measured:
    """The finished runs below a folder. What was read of them is kept in `values`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.values: dict[tuple[str, int, str], Record] = {}

    def run(self, name: str, seed: int) -> RunFolder:
        return RunFolder(folder_of(self.folder, name, seed))

    def seeds(self, *names: str) -> tuple[int, ...]:
        """Of which all of these runs are complete."""
        return tuple(seed for seed in _SEEDS if all(self.run(name, seed).complete() for name in names))

    def record(self, name: str, seed: int, nfe: int, subject: str = "student") -> Record | None:
        """The Frechet distance at a number of evaluations."""
        run = self.run(name, seed)
        for record in [*run.final_records(), *run.later_records()[0]]:
            if record.subject == subject and record.nfe == nfe and record.metric.startswith("fid"):
                return self.values.setdefault((name, nfe, f"{subject} {seed}"), record)
        return None

    def means(self, name: str, seeds: Sequence[int], nfe: int) -> list[float] | None:
        """The student's distance at each seed; None where one was not measured."""
        found = [self.record(name, seed, nfe) for seed in seeds]
        return [record.mean for record in found] if found and all(found) else None

    def costs(self, name: str, seeds: Sequence[int]) -> dict[str, float | None]:
        """Of the training, a mean over the seeds that know it."""
        costs = [read_costs(self.run(name, seed).path) for seed in seeds]
        known = {cost: [each[cost] for each in costs if each[cost] is not None] for cost in COST_NAMES}
        return {cost: statistics.fmean(each) if each else None for cost, each in known.items()}


def claims_of(folder: Path) -> dict[str, Any]:
    """What the runs of `python -m benchmarks.evidence --out FOLDER` say of the claims, as plain values.

    Raises:
        ValueError: Where no claim has runs, and for values that were not measured alike.
    """
    runs = Measured(folder)
    rows = [*_student(runs), *_disback(runs), *_b_dense(runs), *_bezier(runs)]
    if not rows:
        raise ValueError(
            f"{folder} has no claim whose runs are finished: `python -m benchmarks.evidence --out {folder}` goes on"
        )
    fingerprints = [record.comparable for record in runs.values.values()]
    if any(fingerprint != fingerprints[0] for fingerprint in fingerprints):
        raise ValueError(f"{folder} has runs that were not measured alike; give each measurement a folder of its own")
    first = next(iter(runs.values.values()))
    return {
        "data": json.loads((folder / "evidence.json").read_text())["data"],
        "metric": first.metric,
        "fingerprint": first.comparable,
        "rows": [asdict(row) for row in rows],
        "values": [asdict(record) for record in runs.values.values()],
    }


def claims_markdown(content: dict[str, Any]) -> str:
    """The table of `claims_of`, with costs and criteria below it."""
    rows = [Row(**row) for row in content["rows"]]
    said = [
        f"- **{_title_of(claim.name)}**: {claim.paper}." for claim in CLAIMS if claim.name in {r.claim for r in rows}
    ]
    criteria = dict.fromkeys(f"- {_title_of(row.claim)} holds where {row.criterion}." for row in rows)
    costs = [
        [_title(row), name, *(format_cost([costs[cost]]) for cost in COST_NAMES)]
        for row in rows
        for name, costs in row.costs.items()
    ]
    revisions = dict.fromkeys((value["provenance"] or {}).get("revision") or "unknown" for value in content["values"])
    return "\n\n".join(
        [
            "\n".join(["The papers say:", "", *said]),
            f"{content['metric']} of {content['data']}, mean ± standard deviation over training seeds:",
            claims_summary(content),
            "\n".join(criteria),
            describe_fingerprint(content["fingerprint"]),
            f"Commits of the runs: {', '.join(revision[:12] for revision in revisions)}.",
            "What a training cost, its preparation included (seconds beside other runs on the same device):",
            "\n".join(markdown_table([["claim", "method", *COST_NAMES], *costs])),
        ]
    )


def claims_summary(content: dict[str, Any]) -> str:
    """The table alone, as the README has it."""
    rows = [Row(**row) for row in content["rows"]]
    body = [[_title(row), row.measured, row.holds, ", ".join(map(str, row.seeds))] for row in rows]
    return "\n".join(markdown_table([["claim", "measured", "holds", "seeds"], *body]))


def _title_of(claim: str) -> str:
    return {STUDENT: "Denoising Student", DISBACK: "DisBack", B_DENSE: "B-DENSE", BEZIER: "Bézier distillation"}[claim]


def _title(row: Row) -> str:
    return f"{_title_of(row.claim)}, {row.setting}"


def _student(runs: Measured) -> list[Row]:
    name = "denoising_student"
    ratios, faster, seeds, counts = [], [], [], set()
    for seed in runs.seeds(name):
        teachers = {r.nfe for r in runs.run(name, seed).final_records() if r.subject == "teacher"}
        student = runs.record(name, seed, 1)
        teacher = runs.record(name, seed, max(teachers, default=0), "teacher")
        if student and teacher:
            seeds.append(seed)
            counts.add(teacher.nfe)
            ratios.append(student.mean / teacher.mean)
            if student.images_per_second and teacher.images_per_second:
                faster.append(student.images_per_second / teacher.images_per_second)
    if not seeds:
        return []
    nfe = max(counts)
    student = [runs.record(name, seed, 1) for seed in seeds]
    teacher = runs.record(name, seeds[0], nfe, "teacher")
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
    return [
        Row(STUDENT, "L2" if _loss(runs, name, seeds[0]) == "l2" else "L1", text, holds, criterion, tuple(seeds), costs)
    ]


def _loss(runs: Measured, name: str, seed: int) -> str:
    return runs.run(name, seed).plain_config()["method"].get("loss", "l2")


def _disback(runs: Measured) -> list[Row]:
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
        try:
            comparison = compare_runs([runs.run(name, seed) for name in (baseline, method) for seed in seeds])
        except ValueError:
            continue  # without curves
        others = [group for group in comparison.groups if group != comparison.baseline]
        if len(others) != 1:
            continue
        for name in (baseline, method):  # for the fingerprint, and the provenance
            runs.means(name, seeds, 1)
        speeds = {factor: comparison.speed_up(others[0], factor, "images", prepared=True) for factor in FACTORS}
        found = [f"{format_speed_up(speed)} to {comparison.thresholds[factor]:.3g}" for factor, speed in speeds.items()]
        nodes = runs.run(method, seeds[0]).plain_config()["method"]
        setting = f"{setting} ({nodes.get('nodes')} nodes of {nodes.get('interval')} updates)"
        criterion = "with stage 1 it needs fewer images than Diff-Instruct to the latter's best distance, 1.05 and 1.2 times that"
        holds = _all([(speed.median or 0) > 1 for speed in speeds.values()])
        costs = {name.partition("-")[0]: runs.costs(name, seeds) for name in (baseline, method)}
        text = f"times fewer images: {', '.join(found)}"
        rows.append(Row(DISBACK, setting, text, holds, criterion, seeds, costs))
    return rows


def _b_dense(runs: Measured) -> list[Row]:
    rows = []
    for host, pairs in _HOSTS.items():
        texts, ahead, behind, used, costs = [], [], [], set(), {}
        for base, branched, nfe in pairs:
            seeds = runs.seeds(base, branched)
            theirs, ours = (runs.means(name, seeds, nfe) for name in (base, branched))
            if theirs is None or ours is None:
                continue
            better = [a < b for a, b in zip(ours, theirs, strict=True)]
            text = f"{nfe} NFE: {_spread(ours)} against {_spread(theirs)}"
            if moment := _largest_gap(runs, base, branched, seeds):
                text += f" ({moment})"
            texts.append(text)
            ahead += [nfe] if all(better) else []
            behind += [nfe] if not any(better) else []
            used |= {*seeds}
            costs |= {name: runs.costs(name, seeds) for name in (base, branched)}
        if not texts:
            continue
        holds = HOLDS if len(ahead) == len(texts) else PARTLY if ahead else FAILS
        where = [
            f"ahead at every seed at {_listed(ahead)}" if ahead else "",
            f"behind at {_listed(behind)}" if behind else "",
        ]
        text = "; ".join([*filter(None, where), *texts])
        criterion = "its distance is below its host's at every seed, at each number of evaluations"
        rows.append(Row(B_DENSE, f"on {host}", text, holds, criterion, tuple(sorted(used)), costs))
    return rows


def _largest_gap(runs: Measured, base: str, branched: str, seeds: Sequence[int]) -> str | None:
    """At how many images the host's mean curve was furthest above the other one; None without curves at the same places."""
    curves: list[list[Curve]] = []
    for name in (base, branched):
        try:
            curves.append([read_curve(runs.run(name, seed).path, name, seed) for seed in seeds])
        except (ValueError, OSError):
            return None
    places = [[cost.images for cost in curve.costs] for group in curves for curve in group]
    if any(place != places[0] for place in places):
        return None
    means = [[statistics.fmean(values) for values in zip(*(c.values for c in group), strict=True)] for group in curves]
    gaps = [a - b for a, b in zip(*means, strict=True)]
    index = max(range(len(gaps)), key=gaps.__getitem__)
    return f"largest lead {gaps[index]:.3g} at {places[0][index] / 1000:.4g} of {places[0][-1] / 1000:.4g} kimg"


def _bezier(runs: Measured) -> list[Row]:
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
        if values := runs.means(trained, runs.seeds(trained), 2):
            texts.append(f"2 NFE: {label} {_spread(values)}")
    best = [min(runs.record(control, seed, 1).mean for control in distilled) for seed in seeds]
    holds = _all([a < b for a, b in zip(ours, best, strict=True)])
    criterion = "its distance in one evaluation is below the best distilled flow's, at every seed"
    costs = {each: runs.costs(each, seeds) for each in (name, *controls.values())}
    config = runs.run(name, seeds[0]).plain_config()["method"]
    setting = f"order {config.get('order')}, 1-RF and 2-RF"
    return [Row(BEZIER, setting, ", ".join(texts), holds, criterion, seeds, costs)]


def _all(outcomes: Sequence[bool]) -> str:
    return HOLDS if all(outcomes) else PARTLY if any(outcomes) else FAILS


def _spread(values: Sequence[float]) -> str:
    return format_mean_std(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _listed(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts))} NFE"

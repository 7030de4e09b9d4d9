"""A chain of flows as text: what each flow is worth, the students distilled from it, and the bound of their errors."""

import statistics
from collections.abc import Sequence

from stillhouse.analysis.flow_chain import Chain, Distilled
from stillhouse.analysis.flow_errors import Estimate
from stillhouse.analysis.tables import aligned, fingerprint_line, piped, shown

Section = tuple[str, list[list[str]]]


def text(chain: Chain) -> str:
    """Aligned plain text: tables under one line each, then the fingerprint and notes."""
    parts = ["\n".join([heading, *aligned(rows)]) for heading, rows in _sections(chain)]
    return "\n\n".join([*parts, fingerprint_line(chain.fingerprint), *(f"note: {note}" for note in chain.notes)])


def markdown(chain: Chain) -> str:
    """The same for a README."""
    parts = ["\n".join([heading, "", *piped(rows)]) for heading, rows in _sections(chain)]
    notes = "\n".join(f"- {note}" for note in chain.notes)
    return "\n\n".join([*parts, fingerprint_line(chain.fingerprint), *([notes] if notes else [])])


def _sections(chain: Chain) -> list[Section]:
    floor = ", ".join(f"{metric} {mean:.4g}" for metric, (mean, _) in chain.floor.items())
    flows = (
        f"Flows: E|Φ_k - Φ_k-1|², E|Φ_k - Φ_1|² and straightness S ({chain.path_steps} Euler steps) ± standard error over "
        f"{chain.samples:,} samples; distances ± standard deviation over blocks of seeds; real images: {floor}"
    )
    students = (
        "Distilled runs, by their last teacher: r = E|f(x0) - Φ_k(x0)|² on unseen noise, and distances, ± standard deviation "
        "over training seeds"
    )
    bounds = (
        "W2(data, law) <= W2(data, law Φ_1) + sum of steps' roots + root of r, over all pixels; W2 between "
        f"{chain.matched:,} samples and as many real images, which is not zero for equal laws"
    )
    distilled = [(students, _student_rows(chain))] if chain.distilled else []
    return [(flows, _flow_rows(chain)), *distilled, (bounds, _bound_rows(chain))]


def _flow_rows(chain: Chain) -> list[list[str]]:
    counts = list(dict.fromkeys(steps for flow in chain.flows for steps in flow.euler))
    ways = ["simulated", *(f"Euler {steps}" for steps in counts)]
    columns = [f"{metric}, {way}" for metric in chain.metrics for way in ways]
    body = []
    for k, flow in enumerate(chain.flows, 1):
        scores = [flow.simulated, *(flow.euler[steps] for steps in counts)]
        cells = [_shown(value) for value in (flow.step_drift, flow.end_drift, flow.straightness)]
        cells += [shown(*score[metric]) for metric in chain.metrics for score in scores]
        body.append([str(k), f"{flow.name} ({flow.solver})", str(flow.nfe), *cells])
    return [["k", "flow", "NFE", "step drift", "end drift", "S", *columns], *body]


def _student_rows(chain: Chain) -> list[list[str]]:
    body = []
    for group, places in chain.groups().items():
        for k, runs in places.items():
            seeds = ", ".join(str(run.seed) for run in runs)
            copies = ", ".join(dict.fromkeys(run.weights for run in runs))
            cells = [_over_seeds([run.scores[metric][0] for run in runs]) for metric in chain.metrics]
            label = f"{group} ({copies})"
            body.append([str(k), label, seeds, str(runs[0].nfe), _regression(runs), *cells])
    return [["k", "group", "seeds", "NFE", "r", *chain.metrics], *body]


def _bound_rows(chain: Chain) -> list[list[str]]:
    first = f"{chain.flows[0].w2:.4g}"
    body = []
    for k, flow in enumerate(chain.flows, 1):
        body.append(
            [str(k), flow.name, first, f"{chain.drifted(k):.4g}", "–", f"{chain.bound(k):.4g}", f"{flow.w2:.4g}"]
        )
    for group, places in chain.groups().items():
        for k, runs in places.items():
            roots = [run.regression.root for run in runs if run.regression]
            bound = f"{chain.bound(k) + statistics.fmean(roots):.4g}" if len(roots) == len(runs) else "–"
            root = _over_seeds(roots) if len(roots) == len(runs) else "–"
            body.append(
                [str(k), group, first, f"{chain.drifted(k):.4g}", root, bound, _over_seeds([r.w2 for r in runs])]
            )
    return [["k", "law", "W2 of Φ_1", "steps", "root of r", "bound", "W2"], *body]


def _shown(value: Estimate | None) -> str:
    return "–" if value is None else shown(value.mean, value.error)


def _regression(runs: Sequence[Distilled]) -> str:
    values = [run.regression.mean for run in runs if run.regression]
    return _over_seeds(values) if len(values) == len(runs) else "–"


def _over_seeds(values: Sequence[float]) -> str:
    return shown(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

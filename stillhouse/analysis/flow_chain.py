"""A chain of flows, each made from the one before, and what their errors add up to.

With p_1 the distribution of the data, p_f that of a student f distilled from flow k and q_1 that of flow 1,

    W2(p_1, p_f) <= W2(p_1, q_1) + sum_{j < k} sqrt(E |Phi_{j+1} - Phi_j|^2) + sqrt(E |f - Phi_k|^2),

since images of one noise are a coupling. It also holds exactly between finite sets of samples of the same noise.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.analysis.flow_errors import Estimate
from stillhouse.analysis.tables import describe_fingerprint, format_mean_std, markdown_table, text_table
from stillhouse.checkpoints.bounds import parse_json
from stillhouse.metrics.records import Record, rename_old_keys

Scores = dict[str, tuple[float, float | None]]  # metric: (mean, std over blocks of seeds)
TitledTable = tuple[str, list[list[str]]]


@dataclass(frozen=True)
class ChainedFlow:
    """Flow k of a chain.

    Attributes:
        name: of its teacher.
        solver: its own.
        nfe: network evaluations of its own solver.
        step_drift: E |Phi_k - Phi_{k-1}|^2; None for the first flow.
        end_drift: E |Phi_k - Phi_1|^2; None for the first flow.
        straightness: S, see `stillhouse.analysis.flow_errors.path_bending`.
        w2: 2-Wasserstein distance between its samples and real images.
        simulated: scores of its own solver.
        euler: scores of Euler steps, by their number.
        provenance: see `Record.provenance`.
    """

    name: str
    solver: str
    nfe: int
    step_drift: Estimate | None
    end_drift: Estimate | None
    straightness: Estimate
    w2: float
    simulated: Scores
    euler: dict[int, Scores]
    provenance: dict[str, str | None] | None = None


@dataclass(frozen=True)
class DistilledRun:
    """A run whose (last) teacher is a flow of the chain.

    Attributes:
        flow: number of its flow, from 1 on.
        name: of the run.
        group: label of the runs that differ from it in seed and in their place in the chain alone.
        seed: of the run.
        nfe: network evaluations per sample.
        weights: which were measured: an average's name, or raw.
        regression: r = E |f(x0) - Phi_k(x0)|^2 on noise of evaluation seeds, by which no run was trained or chosen; None where
            the run learns the end points of other flows or of several.
        w2: 2-Wasserstein distance between its samples and real images.
        scores: of its samples.
        provenance: see `Record.provenance`.
    """

    flow: int
    name: str
    group: str
    seed: int
    nfe: int
    weights: str
    regression: Estimate | None
    w2: float
    scores: Scores
    provenance: dict[str, str | None] | None = None


@dataclass(frozen=True)
class FlowChain:
    """A measured chain of flows.

    Attributes:
        flows: in order.
        distilled: runs whose last teachers they are.
        samples: number of samples of drifts, straightness and r.
        path_steps: Euler steps of the straightness.
        matched: number of samples, and of real images, that w2 is between.
        fingerprint: of the scores, see `Record.comparable`.
        floor: scores of real images.
        notes: what a reader has to know beside the numbers.
    """

    flows: tuple[ChainedFlow, ...]
    distilled: tuple[DistilledRun, ...]
    samples: int
    path_steps: int
    matched: int
    fingerprint: dict[str, Any]
    floor: Scores
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Names of the scores."""
        return list(self.floor)

    def drifted(self, k: int) -> float:
        """sum_{j < k} sqrt(E |Phi_{j+1} - Phi_j|^2), for k from 1 on."""
        return sum(flow.step_drift.root for flow in self.flows[1:k])

    def bound(self, k: int, regression: Estimate | None = None) -> float:
        """The bound of W2 between real images and flow k, or a student whose r is `regression`."""
        return self.flows[0].w2 + self.drifted(k) + (regression.root if regression else 0.0)

    def groups(self) -> dict[str, dict[int, list[DistilledRun]]]:
        """{group: {k: its runs there}}, in the order of their first runs and of k."""
        groups: dict[str, dict[int, list[DistilledRun]]] = {}
        for run in sorted(self.distilled, key=lambda run: run.flow):
            groups.setdefault(run.group, {}).setdefault(run.flow, []).append(run)
        return groups


def scores_by_metric(records: Sequence[Record]) -> Scores:
    """The scores that records hold."""
    return {record.metric: (record.mean, record.std) for record in records}


def flow_chain_to_json(chain: FlowChain) -> dict[str, Any]:
    """The chain as plain values: all that the rest is computed from, and the bounds."""
    terms = [
        {"flow": k, "first": chain.flows[0].w2, "drifted": chain.drifted(k), "bound": chain.bound(k), "w2": flow.w2}
        for k, flow in enumerate(chain.flows, 1)
    ]
    content = asdict(chain)
    for flow in content["flows"]:
        flow["euler"] = {str(steps): values for steps, values in flow["euler"].items()}
    return _plain(content | {"bounds": terms})


def flow_chain_from_json(content: dict[str, Any]) -> FlowChain:
    """The chain that `flow_chain_to_json` wrote.

    Raises:
        ValueError: for anything else.
    """
    try:
        flows = tuple(_flow(**rename_old_keys(flow)) for flow in content["flows"])
        distilled = tuple(_distilled(**rename_old_keys(run)) for run in content["distilled"])
        plain = {key: content[key] for key in ("samples", "path_steps", "matched", "fingerprint")}
        return FlowChain(flows, distilled, floor=_scores(content["floor"]), notes=tuple(content["notes"]), **plain)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is no measured chain of flows: {error!r}") from error


def load_flow_chain(path: Path) -> FlowChain:
    """Read a flows.json that `write_flow_chain` wrote.

    Raises:
        FileNotFoundError: For no file.
        ValueError: Naming it, for a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no measured flows at {path}; make them by evaluate.py 'flows=[...]'")
    try:
        return flow_chain_from_json(parse_json(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); measure the flows again") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _estimate(value: dict[str, Any] | None) -> Estimate | None:
    return None if value is None else Estimate(**value)


def _scores(values: dict[str, list]) -> Scores:
    return {metric: (mean, std) for metric, (mean, std) in values.items()}


def _flow(*, simulated: dict, euler: dict, **rest: Any) -> ChainedFlow:
    estimates = {key: _estimate(rest.pop(key)) for key in ("step_drift", "end_drift", "straightness")}
    by_steps = {int(steps): _scores(values) for steps, values in euler.items()}
    return ChainedFlow(simulated=_scores(simulated), euler=by_steps, **estimates, **rest)


def _distilled(*, regression: dict | None, scores: dict, **rest: Any) -> DistilledRun:
    return DistilledRun(regression=_estimate(regression), scores=_scores(scores), **rest)


def flow_chain_text(chain: FlowChain) -> str:
    """A chain as aligned plain text: tables under one line each, then the fingerprint and notes."""
    parts = ["\n".join([heading, *text_table(rows)]) for heading, rows in _tables(chain)]
    return "\n\n".join([*parts, describe_fingerprint(chain.fingerprint), *(f"note: {note}" for note in chain.notes)])


def flow_chain_markdown(chain: FlowChain) -> str:
    """The same in Markdown."""
    parts = ["\n".join([heading, "", *markdown_table(rows)]) for heading, rows in _tables(chain)]
    notes = "\n".join(f"- {note}" for note in chain.notes)
    return "\n\n".join([*parts, describe_fingerprint(chain.fingerprint), *([notes] if notes else [])])


def _tables(chain: FlowChain) -> list[TitledTable]:
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
        "W2(data, distribution) <= W2(data, that of Φ_1) + sum of steps' roots + root of r, over all pixels; W2 between "
        f"{chain.matched:,} samples and as many real images, which is not zero for equal distributions"
    )
    distilled = [(students, _student_rows(chain))] if chain.distilled else []
    return [(flows, _flow_rows(chain)), *distilled, (bounds, _bound_rows(chain))]


def _flow_rows(chain: FlowChain) -> list[list[str]]:
    counts = list(dict.fromkeys(steps for flow in chain.flows for steps in flow.euler))
    ways = ["simulated", *(f"Euler {steps}" for steps in counts)]
    columns = [f"{metric}, {way}" for metric in chain.metrics for way in ways]
    body = []
    for k, flow in enumerate(chain.flows, 1):
        scores = [flow.simulated, *(flow.euler[steps] for steps in counts)]
        cells = [_shown(value) for value in (flow.step_drift, flow.end_drift, flow.straightness)]
        cells += [format_mean_std(*score[metric]) for metric in chain.metrics for score in scores]
        body.append([str(k), f"{flow.name} ({flow.solver})", str(flow.nfe), *cells])
    return [["k", "flow", "NFE", "step drift", "end drift", "S", *columns], *body]


def _student_rows(chain: FlowChain) -> list[list[str]]:
    body = []
    for group, places in chain.groups().items():
        for k, runs in places.items():
            seeds = ", ".join(str(run.seed) for run in runs)
            weights = ", ".join(dict.fromkeys(run.weights for run in runs))
            cells = [_over_seeds([run.scores[metric][0] for run in runs]) for metric in chain.metrics]
            label = f"{group} ({weights})"
            body.append([str(k), label, seeds, str(runs[0].nfe), _regression(runs), *cells])
    return [["k", "group", "seeds", "NFE", "r", *chain.metrics], *body]


def _bound_rows(chain: FlowChain) -> list[list[str]]:
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
    return [["k", "distribution", "W2 of Φ_1", "steps", "root of r", "bound", "W2"], *body]


def _shown(value: Estimate | None) -> str:
    return "–" if value is None else format_mean_std(value.mean, value.error)


def _regression(runs: Sequence[DistilledRun]) -> str:
    values = [run.regression.mean for run in runs if run.regression]
    return _over_seeds(values) if len(values) == len(runs) else "–"


def _over_seeds(values: Sequence[float]) -> str:
    return format_mean_std(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

"""A chain of flows, each made from the one before, and what their errors add up to.

The law of a student f distilled from flow k lies within

    W2(pi_1, law f) <= W2(pi_1, law Phi_1) + sum_{j < k} sqrt(E |Phi_{j+1} - Phi_j|^2) + sqrt(E |f - Phi_k|^2)

of the data's law pi_1, since images of one noise are a coupling. Between finite sets of the same noise it holds as exactly.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stillhouse.analysis.flow_errors import Estimate
from stillhouse.metrics.records import Record

Scores = dict[str, tuple[float, float | None]]  # metric: (mean, std over blocks of seeds)


@dataclass(frozen=True)
class Flow:
    """Flow k of a chain.

    step_drift: E |Phi_k - Phi_{k-1}|^2, end_drift: E |Phi_k - Phi_1|^2, None for the first; straightness S. w2: between its
    samples and real images. simulated, euler: scores of its own solver, and of so many Euler steps, by their number.
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
class Distilled:
    """A run whose (last) teacher is flow `flow`, from 1 on.

    regression: r = E |f(x0) - Phi_k(x0)|^2 on noise of evaluation seeds, which no run was trained or chosen on; None where the
    run learns the ends of others or of several. group: label of the runs that differ from it in seed and in their place in the
    chain alone. weights: the measured copy. provenance: see `Record.provenance`.
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
class Chain:
    """samples: from which drifts, straightness and r are; path_steps: Euler steps of the straightness; matched: samples and real
    images that w2 is between. fingerprint, floor (scores of real images): of the scores. notes: what a reader has to know."""

    flows: tuple[Flow, ...]
    distilled: tuple[Distilled, ...]
    samples: int
    path_steps: int
    matched: int
    fingerprint: dict[str, Any]
    floor: Scores
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        return list(self.floor)

    def drifted(self, k: int) -> float:
        """sum_{j < k} sqrt(E |Phi_{j+1} - Phi_j|^2), for k from 1 on."""
        return sum(flow.step_drift.root for flow in self.flows[1:k])

    def bound(self, k: int, regression: Estimate | None = None) -> float:
        """That of W2 between real images and flow k, or a student whose r is `regression`."""
        return self.flows[0].w2 + self.drifted(k) + (regression.root if regression else 0.0)

    def groups(self) -> dict[str, dict[int, list[Distilled]]]:
        """{group: {k: its runs there}}, in the order of their first runs and of k."""
        found: dict[str, dict[int, list[Distilled]]] = {}
        for run in sorted(self.distilled, key=lambda run: run.flow):
            found.setdefault(run.group, {}).setdefault(run.flow, []).append(run)
        return found


def scores(records: Sequence[Record]) -> Scores:
    return {record.metric: (record.mean, record.std) for record in records}


def to_json(chain: Chain) -> dict[str, Any]:
    """Plain values: all that the rest is computed from, then the bounds."""
    terms = [
        {"flow": k, "first": chain.flows[0].w2, "drifted": chain.drifted(k), "bound": chain.bound(k), "w2": flow.w2}
        for k, flow in enumerate(chain.flows, 1)
    ]
    content = asdict(chain)
    for flow in content["flows"]:
        flow["euler"] = {str(steps): values for steps, values in flow["euler"].items()}
    return _plain(content | {"bounds": terms})


def from_json(content: dict[str, Any]) -> Chain:
    """What `to_json` described; ValueError for anything else."""
    try:
        flows = tuple(_flow(**flow) for flow in content["flows"])
        distilled = tuple(_distilled(**run) for run in content["distilled"])
        plain = {key: content[key] for key in ("samples", "path_steps", "matched", "fingerprint")}
        return Chain(flows, distilled, floor=_scores(content["floor"]), notes=tuple(content["notes"]), **plain)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is no measured chain of flows: {error!r}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _estimate(value: dict[str, Any] | None) -> Estimate | None:
    return None if value is None else Estimate(**value)


def _scores(values: dict[str, list]) -> Scores:
    return {metric: (mean, std) for metric, (mean, std) in values.items()}


def _flow(*, simulated: dict, euler: dict, **rest: Any) -> Flow:
    estimates = {key: _estimate(rest.pop(key)) for key in ("step_drift", "end_drift", "straightness")}
    by_steps = {int(steps): _scores(values) for steps, values in euler.items()}
    return Flow(simulated=_scores(simulated), euler=by_steps, **estimates, **rest)


def _distilled(*, regression: dict | None, scores: dict, **rest: Any) -> Distilled:
    return Distilled(regression=_estimate(regression), scores=_scores(scores), **rest)

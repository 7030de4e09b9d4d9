"""The runs behind the claims, as a results file holds them: all that the tables are computed from, so that runs of one machine
can stand beside those of another that is gone.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.claims import BASELINES, CLAIMS
from benchmarks.evidence.jobs import folder_of
from launch.run.folder import RunFolder
from stillhouse.analysis.cost import read_costs
from stillhouse.analysis.curves import Curve, curve_from_json, curve_to_json, read_curve
from stillhouse.metrics.records import Record

_ORDER = [run.name for claim in CLAIMS if claim.name != BASELINES for run in claim.runs]
_SEEDS = range(100)  # those from 100 on are for tuning
_UNTOLD = ("_target_", "name", "seed", "store")  # of a method's options: names, which the run has, and a place
_TEACHER = ("name", "solver", "steps")
_PLAIN = ("name", "seed", "machine", "options", "costs")


@dataclass(frozen=True)
class Trained:
    """One finished run.

    Attributes:
        name: Of `benchmarks.evidence.claims.Run`.
        seed: Of the training.
        machine: On which it was collected.
        options: The method's, with the recipe's and the defaults, teachers by `_TEACHER`. Runs collected before these were kept
            have those that `benchmarks.evidence.claims` gives, and what a table named.
        values: Frechet distances of student and teacher, one at each number of evaluations; first those of the run itself.
        curve: On the way, at `nfe` evaluations; None where there is none.
        costs: Of the training, by `COST_NAMES`.
    """

    name: str
    seed: int
    machine: str
    options: dict[str, Any]
    values: tuple[Record, ...]
    curve: Curve | None
    costs: dict[str, float | None]

    @property
    def nfe(self) -> int:
        """Evaluations of the student as it was trained: of several rounds, in the last one."""
        return next(r.nfe for r in self.values if r.subject == "student")

    def record(self, nfe: int, subject: str = "student") -> Record | None:
        """The distance at a number of evaluations."""
        return next((r for r in self.values if (r.subject, r.nfe) == (subject, nfe)), None)


class TrainedRuns:
    """The runs of one data set, measured alike.

    Attributes:
        data: Of `benchmarks.evidence.claims.DATA`.

    Raises:
        ValueError: For runs that were not measured alike, and for none.
    """

    def __init__(self, data: str, runs: Iterable[Trained]):
        self.data = data
        found = {(run.name, run.seed): run for run in runs}
        self._runs = dict(sorted(found.items(), key=lambda item: (_ORDER.index(item[0][0]), item[0][1])))
        kinds = {record.kind: record for record in self.records}
        if len(kinds) != 1:
            raise ValueError(f"the runs were not measured alike: {len(kinds)} kinds of values, one is needed")
        (first,) = kinds.values()
        self.metric, self.fingerprint = first.metric, first.comparable

    @property
    def records(self) -> list[Record]:
        """All values of all runs."""
        return [record for run in self._runs.values() for record in run.values]

    @property
    def machines(self) -> list[str]:
        """On which the runs were collected."""
        return list(dict.fromkeys(run.machine for run in self._runs.values()))

    def run(self, name: str, seed: int) -> Trained:
        return self._runs[name, seed]

    def seeds(self, *names: str) -> tuple[int, ...]:
        """Of which all of these runs are there."""
        return tuple(seed for seed in _SEEDS if all((name, seed) in self._runs for name in names))

    def means(self, name: str, seeds: Sequence[int], nfe: int) -> list[float] | None:
        """The student's distance at each seed; None where one was not measured."""
        found = [self.run(name, seed).record(nfe) for seed in seeds]
        return [record.mean for record in found] if found and all(found) else None

    def curves(self, name: str, seeds: Sequence[int], nfe: int) -> list[Curve] | None:
        """The curve of each seed at so many evaluations; None where one is missing."""
        found = [self.run(name, seed) for seed in seeds]
        return [run.curve for run in found] if all(run.curve and run.nfe == nfe for run in found) else None

    def costs(self, name: str, seeds: Sequence[int]) -> list[dict[str, float | None]]:
        """Of each seed's training."""
        return [self.run(name, seed).costs for seed in seeds]

    def with_others(self, others: "TrainedRuns") -> "TrainedRuns":
        """These runs and others, of which one takes the place of its namesake.

        Raises:
            ValueError: Where they are of other data or were measured otherwise.
        """
        if (self.data, self.metric, self.fingerprint) != (others.data, others.metric, others.fingerprint):
            raise ValueError(
                f"its runs are of {self.data}, {self.metric} {self.records[0].comparable_id}; the new ones of "
                f"{others.data}, {others.metric} {others.records[0].comparable_id}"
            )
        return TrainedRuns(self.data, [*self._runs.values(), *others._runs.values()])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        runs = [
            {
                **{key: getattr(run, key) for key in _PLAIN},
                "values": [asdict(record) for record in run.values],
                "curve": curve_to_json(run.curve) if run.curve else None,
            }
            for run in self._runs.values()
        ]
        return {"data": self.data, "runs": runs}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "TrainedRuns":
        """What `to_json` wrote."""
        runs = [
            Trained(
                **{key: run[key] for key in _PLAIN},
                values=tuple(Record(**value) for value in run["values"]),
                curve=curve_from_json(run["curve"]) if run["curve"] else None,
            )
            for run in content["runs"]
        ]
        return TrainedRuns(content["data"], runs)


def read_trained(folder: Path, machine: str) -> TrainedRuns:
    """The finished runs that `python -m benchmarks.evidence --out FOLDER` left there for the claims.

    Args:
        folder: Of the runs.
        machine: That they came from.

    Raises:
        ValueError: Where there is none, or where they were not measured alike.
    """
    places = {(name, seed): RunFolder(folder_of(folder, name, seed)) for name in _ORDER for seed in _SEEDS}
    runs = [_read(run, name, seed, machine) for (name, seed), run in places.items() if run.complete()]
    if not runs:
        raise ValueError(
            f"{folder} has no finished run of a claim: `python -m benchmarks.evidence --out {folder}` goes on"
        )
    try:
        return TrainedRuns(json.loads((folder / "evidence.json").read_text())["data"], runs)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; give each measurement a folder of its own") from error


def _read(run: RunFolder, name: str, seed: int, machine: str) -> Trained:
    values: dict[tuple[str, int], Record] = {}
    final = run.final_records()
    for record in [*final, *run.later_records(final)[0]]:
        if record.metric.startswith("fid") and record.subject != "real":
            values.setdefault((record.subject, record.nfe), record)
    try:
        curve = read_curve(run.path, name, seed)
    except (ValueError, OSError):
        curve = None
    options = _options(run.plain_config()["method"])
    return Trained(name, seed, machine, options, tuple(values.values()), curve, read_costs(run.path))


def _options(method: dict[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in method.items() if key not in _UNTOLD}
    if options.get("teacher"):
        options["teacher"] = _teacher(options["teacher"])
    if options.get("teachers"):
        options["teachers"] = [_teacher(teacher) for teacher in options["teachers"]]
    return options


def _teacher(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _TEACHER if key in config}

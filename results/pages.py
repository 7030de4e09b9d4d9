"""Markdown of the measured results: a section for each file of results/, which docs/ shows, and the README's tables."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.all_stages import SHARES
from benchmarks.gpu.report import report
from benchmarks.measuring import ROOT
from benchmarks.run import table
from results.claims import claims_markdown, claims_summary
from results.support import support_table
from results.trained import TrainedRuns
from stillhouse.analysis.convergence import convergence_from_json, convergence_markdown
from stillhouse.analysis.flow_chain import flow_chain_from_json, flow_chain_markdown
from stillhouse.analysis.quality import Quality, QualityValue, quality_from_json, quality_markdown
from stillhouse.analysis.tables import records_markdown
from stillhouse.metrics.provenance import short_revision
from stillhouse.metrics.records import Record

RESULTS = ROOT / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: made by `python -m results update` -->", "<!-- end of results -->"

# The README's rows: the results file, a pattern of what is called what there, and the row's name.
_SUMMARY = (
    ("denoising_student-digits", r"denoising_student-digits-seed\d-method.loss-l1", "Denoising Student"),
    ("score_distillation-digits", r"diff_instruct-.*lr-0.0004-method.sigma_init-2.5", "Diff-Instruct"),
    ("score_distillation-digits", r"disback-.*lr-0.0004-method.sigma_init-2.5", "DisBack"),
    ("baselines-digits", "sid", "SiD"),
    ("baselines-digits", "sida", "SiDA"),
    ("baselines-digits", "dmd2 levels=null", "DMD2"),
    ("baselines-digits", "consistency_distillation", "Consistency distillation"),
    ("baselines-digits", "ect teacher=digits .*", "ECT"),
    ("baselines-digits", "tcm", "TCM after ECT"),
    ("baselines-digits", "cmt", "CMT"),
    ("baselines-digits", "ect teacher=cmt.*", "ECT after CMT"),
    ("baselines_2-digits", "scm", "sCM"),
    ("baselines_2-digits", "mean_flow", "MeanFlow"),
    ("baselines_2-digits", "imm", "IMM"),
    ("baselines_2-digits", "moment_matching", "Moment matching"),
    ("trajectory_distillation-digits", "progressive", "Progressive distillation"),
    ("trajectory_distillation-digits", "sfd", "SFD"),
    ("trajectory_distillation-digits", "b_dense_sfd", "B-DENSE on SFD"),
    ("bezier-digits", "flow_distill teacher=digits_rf2", "Rectified flow, distilled"),
    ("bezier-digits", "bezier later=0.25 .* order=2 slot=endpoint shuffled=false drift=0.0", "Bézier distillation"),
    ("trajectory_distillation-digits", r"teacher digits \(heun\)", "the teacher, Heun's method"),
    ("trajectory_distillation-digits", r"teacher digits \(euler\)", "the teacher, Euler's method"),
)
_SUMMARY_COUNTS = (1, 2, 4, 8, 19)  # network evaluations that the README shows


def section(path: Path, pictures: str = "results") -> str:
    """The tables of one results file, with its picture in the folder `pictures`, and where the values come from."""
    content = json.loads(path.read_text())
    if "outcomes" in content:
        return support_table(content, ROOT / "conf/recipe")
    if "stages" in content:
        return report(list(SHARES), content["stages"])
    if "records" in content:
        return f"{records_markdown([Record(**entry) for entry in content['records']])}\n\n{_source(path, content)}"
    if "claims" in content:
        return f"{claims_markdown(TrainedRuns.from_json(content['claims']))}\n\n{_source(path, content)}"
    for key, against, tables in _KINDS:
        if key in content:
            picture = f"![Metric against {against}]({pictures}/{path.stem}.png)"
            return f"{picture}\n\n{tables(content[key])}\n\n{_source(path, content)}"
    parts = "\n\n".join(table(part) for part in content.values())
    return f"From `results/{path.name}`, as median (least .. greatest):\n\n```text\n{parts}\n```"


_KINDS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("comparison", "updates, images and seconds", lambda content: convergence_markdown(convergence_from_json(content))),
    ("quality", "network evaluations", lambda content: quality_markdown(quality_from_json(content))),
    ("flows", "the number of the flow", lambda content: flow_chain_markdown(flow_chain_from_json(content))),
)


def _source(path: Path, content: dict[str, Any]) -> str:
    source = f"From `results/{path.name}`: commit {short_revision(content['commit'])}, {content['date']}, {content['machine']}"
    entries = measured_entries(content)
    known = sum(entry["provenance"] is not None for entry in entries)
    provenance = (
        f"{known} of {len(entries)} values have their provenance"
        if known
        else "measured before provenance was recorded"
    )
    return f"{source}; {provenance}."


def measured_entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All that was measured in a results file: records, curves, values or flows, each with its `Record.provenance`.

    It is null for what was measured before provenance was recorded.
    """
    flows = content.get("flows", {"flows": [], "distilled": []})
    return [
        *content.get("records", []),
        *content.get("comparison", {"runs": []})["runs"],
        *content.get("quality", {"values": []})["values"],
        *(value for run in content.get("claims", {"runs": []})["runs"] for value in run["values"]),
        *flows["flows"],
        *flows["distilled"],
    ]


def summary() -> str:
    """The README's table: every method on the digits against the number of network evaluations.

    Raises:
        ValueError: For values that were not measured alike, and for a row that names none.
    """
    values: list[QualityValue] = []
    fingerprints, floors = [], []
    for name, pattern, row in _SUMMARY:
        content = json.loads((RESULTS / f"{name}.json").read_text())
        if "quality" in content:
            quality = quality_from_json(content["quality"])
            found = [v for v in quality.values if re.fullmatch(pattern, v.group) and v.nfe in _SUMMARY_COUNTS]
            fingerprints.append(quality.fingerprint)
            floors.append(quality.floor)
        else:
            records = [Record(**entry) for entry in content["records"]]
            chosen = [record for record in records if re.fullmatch(pattern, record.name)]
            found = [_value(record) for record in chosen]
            fingerprints += [record.comparable for record in chosen]
        if not found:
            raise ValueError(f"results/{name}.json has nothing that is called {pattern}")
        values += [QualityValue(**{**vars(value), "group": row, "costs": None}) for value in found]
    if any(fingerprint != fingerprints[0] for fingerprint in fingerprints):
        raise ValueError("the values of the README's table were not measured alike")
    return quality_markdown(Quality("fid_digits", fingerprints[0], tuple(values), floors[0]))


def _value(record: Record) -> QualityValue:
    seed = int(re.search(r"seed(\d+)", record.name)[1])
    return QualityValue(
        record.name, "", seed, record.nfe, record.mean, record.fingerprint["weights"], record.provenance
    )


def updated(text: str) -> str:
    """The README's text with its tables of results made anew; that of the claims once they were measured."""
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"README.md has lost the lines {BEGIN!r} and {END!r}")
    made = "\n\n".join([summary(), *(_claims(path) for path in sorted(RESULTS.glob("claims-*.json")))])
    return f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}"


def _claims(path: Path) -> str:
    runs = TrainedRuns.from_json(json.loads(path.read_text())["claims"])
    heading = (
        f"The papers' claims on {runs.data}, in {runs.metric}; figures and criteria: [claims](docs/results/claims.md)"
    )
    return f"{heading}\n\n{claims_summary(runs)}"

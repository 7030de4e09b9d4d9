"""Records of several training seeds in one row."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from stillhouse.analysis.tables import rate, shown, subject
from stillhouse.metrics.records import SUBJECTS, Record

Labelled = tuple[str, int | None, Record]  # a group of runs that differ by their seed alone (else a name), seed, record


def seed_rows(labelled: Iterable[Labelled]) -> list[list[str]]:
    """Header and body: a row for each label, subject and number of evaluations, a column for each metric.

    A cell is mean ± standard deviation over the training seeds where there are several, else over blocks of evaluation seeds;
    of two values of one seed the first counts. The records share one fingerprint.
    """
    found: dict[tuple, dict[str, dict[int | None, Record]]] = {}
    metrics: dict[str, None] = {}
    for label, seed, r in labelled:
        metrics[r.metric] = None
        key = (SUBJECTS.index(r.subject), label, subject(r), r.nfe)
        found.setdefault(key, {}).setdefault(r.metric, {}).setdefault(seed, r)
    body = [
        _row(key[1], by_metric, list(metrics)) for key, by_metric in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return [["group", "subject", "seeds", "NFE", *metrics, "± over", "images/s"], *body]


def _row(label: str, by_metric: dict[str, dict[int | None, Record]], metrics: Sequence[str]) -> list[str]:
    most = max(by_metric.values(), key=len)
    first = next(iter(most.values()))
    cells = []
    for metric in metrics:
        records = list(by_metric.get(metric, {}).values())
        means = [r.mean for r in records]
        std = statistics.stdev(means) if len(means) > 1 else records[0].std if records else None
        cells.append(shown(statistics.fmean(means), std) if means else "–")
    seeds = sorted(seed for seed in most if seed is not None)
    over = f"{len(most)} training seeds" if len(most) > 1 else f"{len(first.values)} blocks" if first.std else "–"
    rates = [record.images_per_second for record in most.values() if record.images_per_second is not None]
    speed = rate(replace(first, images_per_second=statistics.fmean(rates) if rates else None))
    return [label, subject(first), ", ".join(map(str, seeds)) or "–", str(first.nfe), *cells, over, speed]

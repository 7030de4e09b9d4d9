"""Stages of entries under a limit of time: each entry is a row of DIR/STAGE.json, and a second call goes on with what is left."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.worker import FAILED, NO_MEMORY, TOO_SLOW, Row
from stillhouse.files import write_json
from stillhouse.metrics.provenance import revision

NOT_REACHED = "not reached"
_REPEATED = (FAILED, NO_MEMORY, TOO_SLOW)  # by --retry


@dataclass(frozen=True)
class Setting:
    """What the stages run on.

    Attributes:
        device: "cuda", or "cpu" for a dry run, in which everything is shrunken.
        gpus: How many there are.
        peak_tflops: Of the card's matrix products in bfloat16, dense; None where it is not known.
        fastgen: A checkout of NVIDIA's FastGen, or None.
    """

    device: str
    gpus: int = 0
    peak_tflops: float | None = None
    fastgen: Path | None = None

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    @property
    def accelerator(self) -> str:
        """As Lightning names it."""
        return "cpu" if self.dry else "gpu"


@dataclass(frozen=True)
class Entry:
    """One measurement of a stage.

    Attributes:
        name: Unique in its stage.
        options: What is measured, as JSON can say it; they stand in the entry's row.
        limit: Seconds after which it is stopped.
        least: Seconds without which it is not begun.
    """

    name: str
    options: dict[str, Any]
    limit: float = 60.0
    least: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A kind of measurement.

    Attributes:
        name: Of its file.
        title: For people.
        entries: From a setting to what is measured, the most valuable first.
        measure: From a setting, an entry's options and the seconds that it may take to its figures; a function of a module.
        table: From the stage's rows to Markdown.
        missing: Why there is nothing to measure in a setting; None where there is.
    """

    name: str
    title: str
    entries: Callable[[Setting], Sequence[Entry]]
    measure: Callable[[Setting, dict[str, Any], float], Row]
    table: Callable[[Sequence[Row]], Sequence[str]]
    missing: Callable[[Setting], str | None] = lambda setting: None


class Caller(Protocol):
    """As `Worker`."""

    def call(self, function: Callable[..., Row], *arguments: Any, seconds: float) -> Row: ...


@dataclass
class Budget:
    """So many seconds from now on."""

    seconds: float
    now: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        self._end = self.now() + self.seconds

    def left(self) -> float:
        return self._end - self.now()

    def part(self, share: float) -> "Budget":
        """A share of what is left, from now on."""
        return Budget(share * self.left(), self.now)


def read(folder: Path, stage: Stage) -> dict[str, Any] | None:
    """What the stage's file holds; None where there is none."""
    path = folder / f"{stage.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_stages(
    stages: Mapping[Stage, float],
    setting: Setting,
    machine: dict[str, Any],
    folder: Path,
    budget: Budget,
    worker: Caller,
    *,
    command: str = "",
    retry: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Run each stage in its share of the time; what one leaves goes to those after it.

    Args:
        stages: In their order, with their shares of the time, as numbers of any sum.
        setting: What they run on.
        machine: For the files.
        folder: Where the files are written, and sought: a complete stage is skipped, another one goes on.
        budget: For all of them.
        worker: What carries an entry out.
        command: For the files.
        retry: Whether entries that failed are repeated.
        say: Shows a line of progress.
    """
    shares = [(stage, 0.0 if stage.missing(setting) else share) for stage, share in stages.items()]
    for i, (stage, share) in enumerate(shares):
        rest = sum(other for _, other in shares[i:])
        part = budget.part(share / rest if rest else 0.0)
        head = {
            "stage": stage.name,
            "title": stage.title,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": revision(),
            "command": command,
            "machine": machine,
        }
        run_stage(stage, setting, head, folder, part, worker, retry=retry, say=say)


def run_stage(
    stage: Stage,
    setting: Setting,
    head: dict[str, Any],
    folder: Path,
    budget: Budget,
    worker: Caller,
    *,
    retry: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Measure the stage's entries that have no row yet, writing its file after each; see `run_stages`."""
    stored = read(folder, stage) or {}
    path = folder / f"{stage.name}.json"
    if reason := stage.missing(setting):
        say(f"{stage.name}: skipped, {reason}")
        if not stored.get("entries"):
            write_json(path, {**head, "complete": False, "skipped": reason, "entries": []})
        return
    entries = list(stage.entries(setting))
    rows = {row["entry"]: row for row in stored.get("entries", []) if row["status"] != NOT_REACHED}
    if retry:
        rows = {name: row for name, row in rows.items() if row["status"] not in _REPEATED}
    todo = [entry for entry in entries if entry.name not in rows]
    if not todo:
        say(f"{stage.name}: complete, in {path}")
        return
    say(f"{stage.name}: {stage.title}. {len(todo)} of {len(entries)} entries to do, in {budget.left():.0f} s")

    def write() -> None:
        listed = [rows.get(entry.name, _row(entry, {"status": NOT_REACHED})) for entry in entries]
        complete = all(row["status"] != NOT_REACHED for row in listed)
        write_json(path, {**head, "complete": complete, "entries": listed})

    write()
    for number, entry in enumerate(todo, start=1):
        left = budget.left()
        if left < entry.least:
            continue  # a shorter one may fit
        row = worker.call(stage.measure, setting, entry.options, min(entry.limit, left), seconds=min(entry.limit, left))
        if row["status"] == TOO_SLOW and left < entry.limit:
            say(f"{stage.name} {number}/{len(todo)} {entry.name}: cut off, the stage's time is over")
            continue
        rows[entry.name] = _row(entry, row | {"commit": head["commit"]})
        write()
        outcome = f"{row['status']}: {row['message']}" if row.get("message") else row["status"]
        took = f"{row['wall_seconds']:.1f} s, " if "wall_seconds" in row else ""
        say(
            f"{stage.name} {number}/{len(todo)} {entry.name}: {outcome} ({took}{budget.left():.0f} s left for {stage.name})"
        )


def _row(entry: Entry, row: Row) -> Row:
    return {"entry": entry.name, **entry.options, **row}

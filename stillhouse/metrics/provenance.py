"""Where a measured value comes from: the code's revision, the configuration, the weights."""

import functools
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stillhouse.checkpoints.weights import PROJECT_ROOT, hash_file
from stillhouse.metrics.records import Record


@functools.cache
def revision() -> str | None:
    """Hash of the checked-out commit, with -dirty where tracked files differ from it; None outside a git clone."""
    if not (PROJECT_ROOT / ".git").exists():  # installed, perhaps inside a clone of something else
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def short_revision(full: str | None) -> str:
    """A `revision()` for tables: 7 digits, and -dirty where that is said; unknown without one."""
    digits, mark, _ = (full or "unknown").partition("-dirty")
    return f"{digits[:7]}{mark}"


def with_provenance(records: Sequence[Record], config: Path | str | None, weights: str | None) -> list[Record]:
    """The records with their provenance, see `Record.provenance`. config: the run's config.yaml, or a hash of the settings."""
    if isinstance(config, Path):
        config = hash_file(config) if config.is_file() else None
    provenance = {"revision": revision(), "config": config, "weights": weights}
    return [replace(record, provenance=provenance) for record in records]


def student_provenance(records: Sequence[Record]) -> dict[str, str | None] | None:
    """The provenance of the first student among them."""
    return next((record.provenance for record in records if record.subject == "student"), None)

"""From claims to the queue's jobs, and from their folders to one small file."""

import os
import re
import sys
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.evidence.claims import CLAIMS, COMMON, DATA, Run
from benchmarks.evidence.queue import Job, read_rows
from benchmarks.gpu.worker import PASSED
from benchmarks.measuring import ROOT
from stillhouse.files import atomic_write

LOCK = "lock"  # in --out, of the launch that works there
_WEIGHTS = "student.safetensors"
_LARGE = (".ckpt", ".safetensors", ".npz", ".pt", ".gz")  # a pack is the last


def folder_of(out: Path, run: str, seed: int) -> Path:
    """The folder of a run."""
    return out / f"{run}-seed{seed}"


def jobs(out: Path, data: str, claims: Sequence[str], seeds: Sequence[int], extra: Sequence[str] = ()) -> list[Job]:
    """The jobs of some claims, one seed of all of them after the other.

    Args:
        out: Of the runs' folders.
        data: Of `DATA`.
        claims: Their names.
        seeds: Of the runs.
        extra: Options of train.py, which outdo the runs'.
    """
    runs = [run for claim in CLAIMS if claim.name in claims for run in claim.runs]
    return [_job(Path(os.path.relpath(out, ROOT)), data, run, seed, extra) for seed in seeds for run in runs]


def _job(out: Path, data: str, run: Run, seed: int, extra: Sequence[str]) -> Job:
    folder = folder_of(out, run.name, seed)
    names = {"teacher": DATA[data].teacher, "flow": DATA[data].flow}
    names |= {need: str(folder_of(out, need, seed)) for need in run.needs}
    options = [re.sub(r"\{(\w+)\}", lambda found: names[found[1]], option) for option in run.options]
    where = [f"seed={seed}", f"name={folder.name}", f"hydra.run.dir={folder}"]
    commands = [(sys.executable, "train.py", *DATA[data].options, *options, *COMMON, *where, *extra)]
    if run.steps:
        counts = ",".join(map(str, run.steps))
        commands.append((sys.executable, "evaluate.py", f"run={folder}", f"steps=[{counts}]"))
    needs = tuple(folder_of(out, need, seed).name for need in run.needs)
    return Job(folder.name, tuple(commands), needs)


def pack(out: Path, target: Path) -> int:
    """Write the small files of the finished runs, and the weights that unfinished ones of any claim need, into a .tar.gz.

    A run that is not finished is left out: where its checkpoint is lost it begins again.

    Returns:
        The file's size in bytes.
    """
    passed = {name for name, row in read_rows(out).items() if row["status"] == PASSED}
    needed = _needed(passed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as path, tarfile.open(path, "w:gz") as file:
        for item in sorted(out.rglob("*")):
            run = item.relative_to(out).parts[0]
            small = item.suffix not in _LARGE or (item.name == _WEIGHTS and run in needed and item.parent.name == run)
            if item.is_file() and small and item.name != LOCK and (item.parent in (out, out / "logs") or run in passed):
                file.add(item, arcname=item.relative_to(out))
    return target.stat().st_size


def _needed(passed: Collection[str]) -> set[str]:
    """Those of the runs that passed whose weights a run that did not needs, of any claim: the next machine may be given all."""
    pairs = [(run.name, need) for claim in CLAIMS for run in claim.runs for need in run.needs]
    found = set()
    for folder in passed:
        name, _, seed = folder.rpartition("-seed")
        if any(need == name and f"{run}-seed{seed}" not in passed for run, need in pairs):
            found.add(folder)
    return found

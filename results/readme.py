"""Measured results as files, and the README's tables made from them.

python -m results.readme record results/NAME.json runs/A runs/B    # collect the final records of runs
python -m results.readme update                                    # write the tables into README.md
"""

import json
import sys
from datetime import date
from pathlib import Path

from benchmarks.measuring import ROOT, commit, machine
from benchmarks.run import table
from metrics.files import write_file
from metrics.records import Record, load_records, merge_records
from metrics.tables import markdown

BEGIN, END = "<!-- results: made by `python -m results.readme update` -->", "<!-- end of results -->"


def record(target: Path, folders: list[Path]) -> None:
    """Write the records of the runs' metrics.json into `target`, with the commit and the machine that made them."""
    records: list[Record] = []
    for folder in folders:
        records = merge_records(records, load_records(folder / "metrics.json"))
    here = machine()
    content = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['gpu'] or 'no GPU'}, torch {here['torch']}",
        "runs": [folder.name for folder in folders],
        "records": [vars(r) for r in records],
    }
    write_file(target, (json.dumps(content, indent=2) + "\n").encode())


def tables() -> str:
    """One section for every results file: tables of records, and the figures of benchmarks."""
    sections = []
    for path in sorted((ROOT / "results").glob("*.json"), reverse=True):
        content = json.loads(path.read_text())
        if "records" in content:
            rows = markdown([Record(**entry) for entry in content["records"]])
            origin = (
                f"From `results/{path.name}`: commit {content['commit'][:7]}, {content['date']}, {content['machine']}."
            )
            sections.append(f"{rows}\n\n{origin}")
        else:
            parts = "\n\n".join(table(part) for part in content.values())
            sections.append(f"Speed, from `results/{path.name}`, as median (least .. greatest):\n\n```\n{parts}\n```")
    return "\n\n".join(sections)


def updated(text: str) -> str:
    """The README's text with its results section made anew."""
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"README.md has lost the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


def main(arguments: list[str]) -> None:
    readme = ROOT / "README.md"
    match arguments:
        case ["record", target, *folders] if folders:
            record(Path(target), [Path(folder) for folder in folders])
        case ["update"]:
            write_file(readme, updated(readme.read_text()).encode())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

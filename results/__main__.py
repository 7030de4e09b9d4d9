"""Collects measured results, and makes the README's tables of them.

python -m results record results/NAME.json runs/A runs/B     # the final records of runs
python -m results compare results/NAME.json runs/A runs/B    # how fast they converged, and results/NAME.png
python -m results quality results/NAME.json runs/A runs/B    # adds how good at how many evaluations, and the picture
python -m results flows results/NAME.json runs/flows/flows.json    # what evaluate.py measured of a chain of flows
python -m results gpu results/benchmarks_gpu-CARD.json DIR    # the stages that python -m benchmarks.gpu --out DIR wrote
python -m results claims results/claims-DATA.json DIR    # adds the runs of python -m benchmarks.evidence --out DIR
python -m results update                                     # write the tables into README.md
"""

import sys
from pathlib import Path

from results import collect
from results.pages import README, updated
from stillhouse.files import write_file

_COLLECTED = {"record": collect.record, "compare": collect.compare, "quality": collect.quality}


def main(arguments: list[str]) -> None:
    match arguments:
        case [("record" | "compare" | "quality") as kind, target, *folders] if folders:
            _COLLECTED[kind](Path(target), [Path(folder) for folder in folders])
        case ["flows", target, measured]:
            collect.flows(Path(target), Path(measured))
        case ["gpu", target, folder]:
            collect.gpu(Path(target), Path(folder))
        case ["claims", target, folder]:
            collect.claims(Path(target), Path(folder))
        case ["update"]:
            write_file(README, updated(README.read_text()).encode())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

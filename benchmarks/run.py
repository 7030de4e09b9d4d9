"""Prints how fast the framework is, and what it adds to a bare PyTorch loop of the same computation.

python -m benchmarks.run [--only PART] [--record]

Parts: digits, cifar10, loader, packing, features, score, branching, scaling, methods; and methods_imagenet64, which runs only
when it is named, since it takes an hour and 24 GB of memory.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import branching, features, loader, methods, packing, scaling, score, training
from benchmarks.cases import CIFAR10, DIGITS
from benchmarks.measuring import ROOT, machine, slug
from stillhouse.files import write_json
from stillhouse.metrics.provenance import revision, short_revision

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "digits": lambda: training.measure(DIGITS),
    "cifar10": lambda: training.measure(CIFAR10),
    "loader": loader.measure,
    "packing": packing.measure,
    "features": features.measure,
    "score": score.measure,
    "branching": branching.measure,
    "scaling": scaling.measure,
    "methods": lambda: methods.measure(methods.CIFAR10),
    "methods_imagenet64": lambda: methods.measure(methods.IMAGENET64),
}
_WHEN_NAMED = {"methods_imagenet64"}
RESULTS = ROOT / "results"

# (what the reader sees, key of the record, format of its numbers, unit)
_ROWS = (
    ("training step, framework", "seconds_per_step", ".4g", "s"),
    ("training step, bare PyTorch loop", "bare_seconds_per_step", ".4g", "s"),
    ("overhead of the framework", "overhead", "+.1%", ""),
    ("writing a checkpoint", "checkpoint_seconds", ".3g", "s"),
    ("teacher", "teacher_samples_per_second", ",.4g", "samples/s"),
    ("student", "student_samples_per_second", ",.4g", "samples/s"),
    ("student over teacher", "speed_up", ".3g", "times"),
    ("loader", "images_per_second", ",.0f", "images/s"),
    ("loader, on the device as floats", "decoded_images_per_second", ",.0f", "images/s"),
    ("DataLoader, item by item", "per_item_images_per_second", ",.0f", "images/s"),
    ("loader over DataLoader", "over_per_item", ".3g", "times"),
    ("PNG folder, DataLoader", "png_0_workers_images_per_second", ",.0f", "images/s"),
    ("loader over that", "over_png_0_workers", ".3g", "times"),
    ("PNG folder, 2 workers", "png_2_workers_images_per_second", ",.0f", "images/s"),
    ("loader over that", "over_png_2_workers", ".3g", "times"),
    ("PNGs in a zip", "zip_images_per_second", ",.0f", "images/s"),
    ("JPEGs in a folder", "jpeg_images_per_second", ",.0f", "images/s"),
    ("float32, as in metrics", "features_images_per_second", ".3g", "images/s"),
    ("under bfloat16", "bf16_features_images_per_second", ".3g", "images/s"),
    ("bfloat16 over float32", "bf16_over_float32", ".3g", "times"),
    ("fake-score update", "fake_seconds", ".4g", "s"),
    ("its evaluations and Adam's step", "fake_floor_seconds", ".4g", "s"),
    ("update over that floor", "fake_over_floor", "+.1%", ""),
    ("generator update", "generator_seconds", ".4g", "s"),
    ("its evaluations and Adam's step", "generator_floor_seconds", ".4g", "s"),
    ("update over that floor", "generator_over_floor", "+.1%", ""),
    ("one update of each", "cycle_seconds", ".4g", "s"),
    ("updates over their floor", "cycle_over_floor", "+.1%", ""),
    ("training images", "training_images_per_second", ",.4g", "images/s"),
    ("both in one (two_sided)", "both_seconds", ".4g", "s"),
    ("its evaluations and Adam's steps", "both_floor_seconds", ".4g", "s"),
    ("update over that floor", "both_over_floor", "+.1%", ""),
    ("training images, two_sided", "both_training_images_per_second", ",.4g", "images/s"),
    ("training step, one branch", "plain_step_seconds", ".4g", "s"),
    ("training step, all branches", "branched_step_seconds", ".4g", "s"),
    ("added to the step", "branched_step_over_plain", "+.2%", ""),
    ("step, one process", "single_step_seconds", ".4g", "s"),
    ("two, averaged, same batch", "strong_step_seconds", ".4g", "s"),
    ("two, DDP, same batch", "strong_ddp_step_seconds", ".4g", "s"),
    ("two, averaged, twice the batch", "weak_step_seconds", ".4g", "s"),
    ("images/s of two over one, averaged", "strong_over_single", ".3g", "times"),
    ("the same by DDP", "strong_ddp_over_single", ".3g", "times"),
    ("the same, twice the batch", "weak_over_single", ".3g", "times"),
    ("inference, one branch", "plain_inference_seconds", ".4g", "s"),
    ("inference, end point of all", "branched_inference_seconds", ".4g", "s"),
    ("added to inference", "branched_inference_over_plain", "+.2%", ""),
)

_UPDATES = {"fake": "the fake-score update", "generator": "the generator update", "both": "a two_sided update"}


def table(result: dict[str, Any]) -> str:
    """A part's figures for people: median (least .. greatest)."""
    if "methods" in result:
        return methods.table(result)
    if "beside_fastgen" in result:
        return _beside_fastgen(result)
    if "parts" in result:
        return "\n\n".join(map(table, result["parts"]))
    lines = [result["title"], f"  {_conditions(result)}"]
    for label, key, form, unit in _ROWS:
        if key in result:
            median, least, greatest = (format(result[key][k], form) for k in ("median", "min", "max"))
            lines.append(f"  {label:<34}{median:>9} {unit:<11}({least} .. {greatest})")
    if "checkpoint_every_n_steps" in result:
        every, share = result["checkpoint_every_n_steps"], result["checkpoint_share_of_step"]
        lines.append(f"  A checkpoint every {every} steps, not in the figures above, adds {share:.1%} to a step.")
    if "added_parameters" in result:
        step, inference = (_added(result[f"{kind}_operations"]) for kind in ("step", "inference"))
        lines.append(
            f"  The branches add {result['added_parameters']:,} parameters. Floating point operations, counted: "
            f"{step} to a step, {inference} to inference."
        )
    if "bytes_per_step" in result:
        each = "; ".join(f"{name}: {count / 1e6:.4g} MB" for name, count in result["bytes_per_step"].items())
        lines.append(f"  Gradients that a process gives to all-reduce in a step, trainer.strategy={each}.")
    if "bf16_difference" in result:
        lines.append(f"  bfloat16 changes features by {result['bf16_difference']:.1%} of their spread.")
    for update, networks in result.get("evaluations", {}).items():
        counted = ", ".join(f"{name} with gradient" if trained else name for name, trained in networks.items())
        evaluations, floor = (result[f"{update}_{key}_seconds"]["median"] for key in ("evaluation", "floor"))
        lines.append(
            f"  Counted in {_UPDATES[update]}: {counted}. Adam's part of the floor: {1 - evaluations / floor:.1%}."
        )
    return "\n".join(lines)


def _beside_fastgen(result: dict[str, Any]) -> str:
    """What `benchmarks.fastgen` has measured."""
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    size, version = f"{result['parameters'] / 1e6:.3g} M parameters", short_revision(result["fastgen"])
    mix = " to ".join(map(str, result["mix"].values()))
    names = {"fake": "fake-score update", "generator": "generator update", "mix": f"mean at {mix}"}
    rounds = result["beside_fastgen"]["mix"]["ratio"]["repeats"]
    lines = [
        result["title"],
        f"  {result['device']}, {threads} of each, batch {result['batch_size']}, {size}; FastGen {version}",
        f"  Seconds of an update with its optimiser's step, in {rounds} rounds of turns; ratio: ours over FastGen's in a round",
        f"  {'':<22}{'FastGen':<24}{'ours':<24}ratio",
    ]
    for kind, name in names.items():
        figures = (result["beside_fastgen"][kind][column] for column in ("fastgen", "ours", "ratio"))
        cells = [f"{each['median']:.3g} ({each['min']:.3g} .. {each['max']:.3g})" for each in figures]
        lines.append(f"  {name:<22}{cells[0]:<24}{cells[1]:<24}{cells[2]}")
    peaks = {name: f"{gib:.1f} GiB" for name, gib in result["peak_gib"].items()}
    lines.append(f"  {'peak of memory':<22}{peaks['fastgen']:<24}{peaks['ours']}")
    return "\n".join(lines + ([f"  Ours with {' '.join(result['options'])}"] if result["options"] else []))


def _added(operations: dict[str, int]) -> str:
    return f"{operations['branched'] / operations['plain'] - 1:+.3%} of {operations['plain'] / 1e9:.4g} G"


def _conditions(result: dict[str, Any]) -> str:
    facts = [result["device"], f"batch {result['batch_size']}"]
    if "parameters" in result:
        facts += [
            f"{result['parameters'] / 1e6:.3g} M parameters",
            f"teacher {result['teacher_weights']}",
        ]
    if "pairs" in result:
        facts[-1] += f" ({result['teacher_solver']}, NFE {result['teacher_nfe']})"
        facts.append(f"pairs {result['pairs']}")
    return ", ".join(facts)


def record(results: dict[str, dict[str, Any]], folder: Path, name: str = "benchmarks") -> Path:
    """Write the parts measured now into the machine's file; other parts stay there as they were."""
    path = folder / f"{name}-{slug(next(iter(results.values()))['machine'])}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, stored | results)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--record", action="store_true", help="also write results/benchmarks-MACHINE.json")
    options = parser.parse_args(arguments)
    chosen = [options.only] if options.only else [name for name in PARTS if name not in _WHEN_NAMED]
    only = ["--only", options.only] if options.only else []
    command = shlex.join(["python", "-m", "benchmarks.run", *only, *(["--record"] if options.record else [])])

    here = machine()
    threads = f"{here['cores']} cores, {here['threads']} torch threads"
    print(f"{here['cpu']}, {threads}, {here['gpu'] or 'no GPU'}, torch {here['torch']}, load {here['load']}")
    print("Each figure: median (least .. greatest).", flush=True)
    results = {}
    for name in chosen:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results[name] = {"date": when, "commit": revision(), "command": command, "machine": machine(), **PARTS[name]()}
        print(f"\n{table(results[name])}", flush=True)
    if options.record:
        print(f"\n{record(results, RESULTS)} written")


if __name__ == "__main__":
    main()

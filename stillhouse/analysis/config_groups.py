"""Groups of runs whose configs differ by the seed alone, and how other configs differ."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Leaves of a run's config, or what they begin with, that change neither its training nor what its curve is measured by.
_IRRELEVANT = (
    "seed",
    "name",
    "folder",
    "logger",
    "hydra",
    *(f"callbacks.{name}" for name in ("checkpoints", "guard", "progress", "grid", "curves", "metrics.batch_size")),
    *(f"evaluation.{name}" for name in ("num_samples", "blocks", "batch_size", "metrics")),
    *(f"trainer.{name}" for name in ("log_every_n_steps", "validate_every_n_steps")),
    "data.root",
    "data.batch_size",  # a copy
    "method.store",
)
_MEASURED_ON = ("data.", "evaluation.extractor", "evaluation.labels", "evaluation.training.num_samples")

# Options that choose how many evaluations a student takes: another number is another place on the same line.
_STEPS = ("method.steps", "method.end_steps")
_NAMES = ("name", "folder")
_SEVERAL = "method.teachers"
_WATCHED = ("evaluation.training", "callbacks.metrics", "callbacks.grid")  # how a run's curve is made, not how it ends

ComparableOptions = dict[str, str]


def comparable_options(config: Mapping[str, Any], shared: Collection[str] = ()) -> ComparableOptions:
    """Return the options that decide a run's results, {dotted key: value}, equal for runs that differ by their seed alone.

    Devices are not among them: results do not depend on them, but seconds do. A teacher that is a run of the same seed, by its
    name, counts as the same for all seeds; also one of several.

    Args:
        config: The run's, plain.
        shared: Names of teachers for which that does not hold.
    """
    folder, own = str(config.get("folder")), re.compile(rf"-seed{config.get('seed')}(?!\d)")
    teachers = _teachers(config)
    chained = {place for place, name in teachers.items() if name not in shared and own.search(name)}
    names = {place: own.sub("-seed*", name) if place in chained else name for place, name in teachers.items()}
    options = {}
    for key, value in _leaves(config):
        ours = key.rpartition(".")[2] == "seed" or any(_within(key, k) for k in _IRRELEVANT)
        place, _, last = key.rpartition(".")
        if place in chained and last in ("weights", "sha256"):
            continue
        if place in chained and last == "name":
            value = names[place]
        elif key == _SEVERAL and any(_within(one, key) for one in chained):
            value = ",".join(name for one, name in names.items() if _within(one, key))
        if not ours or (key == "callbacks.guard.gradients" and value == "replace"):
            text = value if isinstance(value, str) else json.dumps(value)
            inside = text == folder or text.startswith(f"{folder}/")
            options[key] = text.replace(folder, "FOLDER", 1) if inside else text
    return options


def compared_options(configs: Sequence[Mapping[str, Any]]) -> list[ComparableOptions]:
    """Return the comparable options of runs beside each other: a teacher of several seeds of a method is one teacher for them."""
    seeds: dict[tuple, set] = {}
    for config in configs:
        for name in _teachers(config).values():
            seeds.setdefault((config["method"].get("name"), name), set()).add(config.get("seed"))
    shared = {teacher for teacher, users in seeds.items() if len(users) > 1}
    return [
        comparable_options(config, [name for method, name in shared if method == config["method"].get("name")])
        for config in configs
    ]


def training_options(options: ComparableOptions) -> ComparableOptions:
    """Return comparable options without the student's number of steps, and without what is measured on the way.

    A list of steps stays, since a network for several is trained otherwise.
    """
    counted = {key: text for key, text in options.items() if not (key in _STEPS and text.isdigit())}
    return {key: text for key, text in counted.items() if not any(_within(key, k) for k in _WATCHED)}


def labels(options_of_runs: Sequence[ComparableOptions]) -> list[str]:
    """Return each run's group: its method's name and, where a method has several groups, the options that set them apart."""
    names = [one.get("method.name", "") for one in options_of_runs]
    groups = []
    for name, one in zip(names, options_of_runs, strict=True):
        same = [other for other, method in zip(options_of_runs, names, strict=True) if method == name]
        keys = _differing(dict.fromkeys(key for other in same for key in other), same)
        keys = [key for key in keys if not _distinguished_by_names(key, keys, same)]
        groups.append(" ".join([name, *(f"{_short(key, keys)}={one.get(key, 'absent')}" for key in keys)]))
    return groups


def other_differences(baseline: ComparableOptions, other: ComparableOptions) -> list[str]:
    """Return options that two methods share, with different values ("lr 1e-05, not 1e-04"), perhaps by mistake."""
    common = [k for k in baseline if k in other and k != "method.name" and not k.endswith("_target_")]
    keys = _differing(common, (baseline, other))
    return [f"{_short(key, keys)} {other[key]}, not {baseline[key]}" for key in keys]


def measuring_difference(baseline: ComparableOptions, other: ComparableOptions) -> str | None:
    """Return the first option by which two runs' curves are measured on other data or by other features; None for none."""
    keys = dict.fromkeys(key for one in (baseline, other) for key in one if key.startswith(_MEASURED_ON))
    return next((k for k in keys if baseline.get(k) != other.get(k)), None)


def options_that_differ(configs: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, list[str | None]]:
    """Return {dotted key: each run's value as text, None where it has none}, without names, and copies such as method.seed.

    Args:
        configs: Each after the name of its run's folder, which as a part of a path is no difference.
    """
    runs = []
    for name, config in configs:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _leaves(config)}
        runs.append({k: "FOLDER" if name in text.split("/") else text for k, text in texts.items() if k not in _NAMES})
    keys = _differing(dict.fromkeys(key for run in runs for key in run), runs)
    return {key: [run.get(key) for run in runs] for key in keys}


def names_in(value: Any) -> str | None:
    """Return the names in a plain list of named configs, as method.teachers is: "digits_rf1,digits_rf2"; None of others."""
    named = isinstance(value, list) and value and all(isinstance(part, dict) and "name" in part for part in value)
    return ",".join(str(part["name"]) for part in value) if named else None


def _leaves(node: Any, key: str = "") -> list[tuple[str, Any]]:
    """Of dicts, and of lists of named configs, which are a leaf of their names too."""
    names = names_in(node)
    if not isinstance(node, dict) and names is None:
        return [(key, node)]
    parts = node.items() if isinstance(node, dict) else enumerate(_unnamed(config) for config in node)
    inner = [leaf for k, v in parts for leaf in _leaves(v, f"{key}.{k}" if key else str(k))]
    return inner if names is None else [(key, names), *inner]


def _unnamed(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "name"}


def _teachers(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of a run's teachers by their places, such as method.teachers.1."""
    method = config.get("method", {})
    found = {"teacher": config.get("teacher"), "method.teacher": method.get("teacher")}
    if names_in(method.get("teachers")) is not None:
        found |= {f"{_SEVERAL}.{i}": teacher for i, teacher in enumerate(method["teachers"])}
    return {place: str(one["name"]) for place, one in found.items() if isinstance(one, Mapping) and "name" in one}


def _within(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")


def _differing(keys: Iterable[str], runs: Sequence[ComparableOptions]) -> list[str]:
    """Those in which runs differ, without copies of one option (teacher.steps and method.teacher.steps)."""
    first_keys: dict[tuple, str] = {}
    for key in keys:
        values = tuple(run.get(key) for run in runs)
        if len(set(values)) > 1:
            first_keys.setdefault((key.rpartition(".")[2], values), key)
    return list(first_keys.values())


def _distinguished_by_names(key: str, keys: Sequence[str], runs: Sequence[ComparableOptions]) -> bool:
    """Whether the names of the config or list that `key` lies in, which differ too, tell apart all runs that `key` does."""
    names = [k for k in keys if k != key and _within(key, k.removesuffix(".name"))]
    return any(len({r.get(k) for r in runs}) == len({(r.get(k), r.get(key)) for r in runs}) for k in names)


def _short(key: str, keys: Sequence[str]) -> str:
    """Its last part, unless another of `keys` ends alike: of method.teacher.name, teacher."""
    last = _last(key)
    return last if sum(_last(k) == last for k in keys) == 1 else key


def _last(key: str) -> str:
    return key.removesuffix(".name").rpartition(".")[2]

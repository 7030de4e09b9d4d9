"""What evaluate.py can be asked for, and which options each task uses; any other one is refused instead of passed over."""

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

_HOW = {"num_samples", "blocks", "metrics", "device", "download", "steps"}
_RUNS = _HOW | {"run", "weights", "checkpoint", "evaluation"}
_CHOSEN = {"teacher", "data", "seed"}
_FLOWS = _HOW | {"flows", "data", "evaluation", "seed", "flows_folder", "flow_samples", "path_steps"}
USES = {
    "run=RUN": _RUNS | {"export"},
    "'run=[RUN,RUN]'": _RUNS | {"comparison"},
    "teacher=NAME": _HOW | _CHOSEN | {"evaluation", "solver"},
    "teacher=NAME check=true": _CHOSEN | {"check", "device", "download"},
    "'flows=[NAME,NAME]'": _FLOWS,
    "'flows=[NAME,NAME]' distilled=RUN": _FLOWS | {"distilled", "weights", "checkpoint"},
    "'run=[runs/*]' report=FILE.html": {"run", "report"},
}


def listed(value: Any, option: str) -> list[str]:
    """One name or a list of some, as an option gives them. Errors: ValueError for an empty list, and for what is no name."""
    names = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    if not isinstance(names, list) or not names or any(type(name) not in (str, int, float) for name in names):
        raise ValueError(f"{option}={value} must be a name or a list of some, such as '{option}=[runs/A,runs/B*]'")
    return [str(name) for name in names]


def chosen_task(cfg: Any, runs: int) -> str:
    """The task, in the words of `USES`, that a command asks for; runs: how many its `run` names. Errors: ValueError for none."""
    teacher = bool(cfg.teacher)
    if cfg.report is not None:
        if cfg.run is None:
            raise ValueError("a report is made of runs that are measured already: say 'run=[runs/*]' report=...")
        return "'run=[runs/*]' report=FILE.html"
    if bool(runs) + teacher + (cfg.flows is not None) != 1:
        raise ValueError(
            "say what to measure: run=runs/NAME (or a list, or a pattern), teacher=NAME or 'flows=[NAME,NAME]', one of them"
        )
    if teacher:
        return "teacher=NAME check=true" if cfg.check else "teacher=NAME"
    if runs:
        return "run=RUN" if runs == 1 else "'run=[RUN,RUN]'"
    return "'flows=[NAME,NAME]'" if cfg.distilled is None else "'flows=[NAME,NAME]' distilled=RUN"


def check_used(task: str, cfg: Any, overrides: Sequence[str]) -> None:
    """Errors: ValueError for an override of the command line that the task does not use, unless it switches something off."""
    for override in overrides:
        key = re.split(r"[=.@/]", override.lstrip("+~"), maxsplit=1)[0]
        value = cfg.get(key)
        if key in USES[task] or value is None or value is False or value == {}:
            continue
        users = [name for name, keys in USES.items() if key in keys]
        raise ValueError(f"{key} has no effect on {task}" + (f"; it is for {', '.join(users)}" if users else ""))

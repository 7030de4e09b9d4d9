"""Errors of the command line, each in one line with the nearest name that exists, and what follows from the options given.

Hydra composes a config before the program's own code runs, and reports errors in several lines of its own.
"""

import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal import utils
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.run.names import data_of

PROJECT_ROOT = Path(__file__).resolve().parent.parent
_SHOWN = 3  # suggestions at most
_LISTED = 12  # choices at most; of more the folder is named
_ALIKE = 0.6  # difflib's ratio from which names are worth a suggestion


def run(main: Callable[[], Any]) -> None:
    """Run a program's Hydra entry: what is wrong with its command line is one line on stderr and exit code 1.

    With HYDRA_FULL_ERROR=1 it is Hydra's own report, a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text, and are no reason to end
    hydras = utils.run_and_report
    utils.run_and_report = lambda function: hydras(lambda: _reported(function))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        _end_without_reader()
    finally:
        utils.run_and_report = hydras


def _end_without_reader() -> NoReturn:
    """End silently, as other programs do whose output nobody reads any more: `--help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
    sys.exit(128 + signal.SIGPIPE)


def _reported(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except BrokenPipeError:
        _end_without_reader()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        from launch.errors import JobFailed

        if isinstance(error, JobFailed) or os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        sys.stderr.write(f"error: {explained(error)}\n")
        sys.exit(1)


def explained(error: BaseException) -> str:
    """One line for an error of composing a config."""
    if isinstance(error, OSError) and error.filename and not Path(error.filename).is_dir():
        return (
            f"the folder {error.filename} can't be made ({error.strerror}): move away what is in its place, start the command "
            "in a folder that can be written to, or choose another name=..."
        )
    given = _given()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _missing_choice(*error.missing_cfg_file.rpartition("/")[::2], error.options, given)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} can't be read: {_joined(error.message.partition('See http')[0])}; say KEY=VALUE"
    for override in given:
        group = override.key_or_group
        if (override.is_delete() or override.value() is None) and choices(group):
            needed = group in _compose([])  # the others have no part of their own in the config
            if needed or not override.is_delete():
                optional = not needed and _composes([f"~{group}"])
                choose = f"say ~{group} to leave it out" if optional else _one_of(group, choices(group))
                return f"{override.input_line}: {group} can't be {'null' if optional else 'left out'}; {choose}"
    if several := re.match(r"Multiple values for (\w+)\. To override", _message(error)):
        return f"{several[1]} is a choice that the config has: say {several[1]}=NAME, without +"
    gone = re.match(r"Interpolation key '(\w+)", _message(error))
    if gone and any(override.is_delete() and override.key_or_group == gone[1] for override in given):
        return f"~{gone[1]}: {gone[1]} can't be left out"
    unknown = re.match(r"(?:In '[^']*': )?Could not (?:override|delete)[^']*'([^']+)'", _message(error))
    if unknown:
        return _unknown_key(unknown[1].partition("@")[0])
    return _joined(_message(error).partition("Config search path:")[0])


def typed_options() -> list[str]:
    """The options of the command, without Hydra's own, as they were typed: with their interpolations."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def check_choices() -> None:
    """Check that each choice of the command is there, also in an optional group, where Hydra passes over it.

    Raises:
        ValueError: Where the command names a choice that is not there for an optional group, which Hydra passes over.
    """
    for override in OverridesParser.create().parse_overrides(typed_options()):
        group, name = override.key_or_group, override.value() if not override.is_delete() else None
        options = choices(group)
        if options and isinstance(name, str) and not _exists(group, name):
            raise ValueError(_missing_choice(group, name, options, [override]))


def choose_task() -> None:
    """Add to the command of evaluate.py what follows from its options.

    A command with `flows` or `teacher` and no `task` is that task; a teacher without `data` is measured on the data set that
    it is named after. (conf/ could say the latter by an interpolation, but below one Hydra takes no `override`, by which a data
    config that is derived from another one chooses its evaluation.)
    """
    given = {override.key_or_group: override for override in _given() if not override.is_sweep_override()}
    task = next((name for name in ("flows", "teacher") if name in given), None)
    if task is not None and "task" not in given:
        sys.argv.append(f"task={task}")
    if "teacher" in given and "data" not in given and isinstance(given["teacher"].value(), str):
        data = data_of(given["teacher"].value())
        if "/" in data or any((folder / "data" / f"{data}.yaml").is_file() for folder in _config_folders(given)):
            sys.argv.append(f"data={data}")


def _config_folders(given: Mapping[str, Override]) -> Iterator[Path]:
    yield PROJECT_ROOT / "conf"
    if _arguments().config_dir:
        yield Path(_arguments().config_dir)
    for place in given["hydra.searchpath"].value() if "hydra.searchpath" in given else ():
        yield Path(str(place).removeprefix("file://"))


def chosen_by_itself(group: str) -> str | None:
    """What an optional group holds that the command does not name; None where it holds nothing."""
    hydra = HydraConfig.get()
    name = hydra.runtime.choices.get(group)
    typed = any(override.lstrip("+~").startswith(f"{group}=") for override in typed_options())
    return name if not typed and name and _exists(group, name) else None


def _exists(group: str, name: str) -> bool:
    """Whether a composed config has this choice, also in folders that hydra.searchpath adds, or as a run's folder."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    known = GlobalHydra.instance().config_loader().repository.config_exists(f"{group}/{name}")
    return known or any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _missing_choice(group: str, name: str, options: Sequence[str], given: Iterable[Override]) -> str:
    near = difflib.get_close_matches(name, options, _SHOWN, _ALIKE)
    if any(override.key_or_group == group for override in given):
        choose = f"did you mean {' or '.join(near)}?" if near else _one_of(group, options)
        return f"{group}={name} is not among conf/{group}; {choose}"
    return f"{group}={name}, which the other options ask for, is not among conf/{group}; {_one_of(group, options)}"


def _one_of(group: str, options: Sequence[str]) -> str:
    named = ", ".join(options) if len(options) <= _LISTED else f"see the {len(options)} in conf/{group}"
    return f"choose {group}=NAME: {named}"


# What was an option of evaluate.py, and is a task.
_TASKS = {
    "check": "task=self_test teacher=NAME",
    "report": "task=report 'run=[runs/*]' target=FILE.html",
    "export": "task=export run=runs/NAME target=FOLDER",
}


def _unknown_key(key: str) -> str:
    config = _composed()
    if (
        key.startswith("hydra.sweeper.")
        and OmegaConf.select(_compose(["hydra/sweeper=search"]), key, default=key) != key
    ):
        return (
            f"{key} is an option of a search, and this command has none: add -m hydra/sweeper=search, or leave it out"
        )
    if (task := _chosen_task(config)) and "." not in key:
        if key in _TASKS:
            return f"{key} is a task of its own: python evaluate.py {_TASKS[key]}"
        if others := [f"task={name}" for name in choices("task") if _has_option(name, key)]:
            return f"there is no option {key} of task={task}; it is of {', '.join(others)}"
    teacher, method = config.get("teacher", {}), config.get("method", {})
    if key.startswith("teacher.") and "_target_" not in teacher and "teacher" in method:
        return f"there is no option {key} without a teacher: say teacher=NAME (conf/teacher) or teacher=runs/NAME"
    names = list(_dotted(OmegaConf.to_container(config, resolve=False)))
    names += [group for group in OmegaConf.to_container(config.hydra.runtime.choices) if not group.startswith("hydra/")]
    near = nearest(key, [name for name in names if name.partition(".")[0] != "hydra"])
    choose = f"; did you mean {' or '.join(near)}?" if near else "; --cfg job shows all options"
    more = f" (an option of Lightning's own: +{key}=...)" if key.startswith("trainer.") else ""
    return f"there is no option {key}{choose}{more}"


def _chosen_task(config: DictConfig) -> str | None:
    """Return the task of a command of evaluate.py; None of other programs."""
    given = [override.value() for override in _given() if override.key_or_group == "task"]
    return given[-1] if given else config.hydra.runtime.choices.get("task")


def _has_option(task: str, key: str) -> bool:
    """Whether a task of evaluate.py has an option or a group of this name."""
    config = _compose([f"task={task}"])
    return key in config or key in config.hydra.runtime.choices


def nearest(key: str, names: Iterable[str]) -> list[str]:
    """Names like the dotted `key`: beside it, or of the same last part elsewhere, or alike as a whole; the best first."""
    names = sorted(set(names) - {key})
    parent, _, leaf = key.rpartition("/")[2].rpartition(".")  # a group may have been inside of another one
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    matches = [beside[near] for near in difflib.get_close_matches(leaf, beside, _SHOWN, _ALIKE)]
    matches += sorted((name for name in names if name.rpartition(".")[2] == leaf), key=lambda name: name.count("."))
    matches = matches or difflib.get_close_matches(key, names, _SHOWN, 0.8)
    return list(dict.fromkeys(matches))[:_SHOWN]


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted(value, f"{prefix}{key}.")


def _composed() -> DictConfig:
    """The config of the command's choices, without its other options; of the defaults where those do not go together."""
    groups = [o.input_line for o in _given() if not o.is_sweep_override() and choices(o.key_or_group)]
    return _compose(groups if _composes(groups) else [])


def _composes(overrides: list[str]) -> bool:
    try:
        _compose(overrides)
    except (HydraException, OmegaConfBaseException, ValueError):
        return False
    return True


def _compose(overrides: list[str]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration(_arguments().config_name or _program(), overrides, RunMode.RUN)


def _arguments() -> Any:
    return utils.get_args_parser().parse_known_args()[0]


def _program() -> str:
    """The config of the program that runs."""
    return "evaluate" if os.path.basename(sys.argv[0]).startswith("evaluate") else "config"


def _given() -> list[Override]:
    """The command's options, as far as they can be read."""
    overrides = []
    for argument in _arguments().overrides:
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            continue
    return overrides


def choices(group: str) -> list[str]:
    """List the names in a group of conf/; empty where `group` is an option."""
    if "." in group or not GlobalHydra.instance().is_initialized():
        return []
    return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def _message(error: BaseException) -> str:
    """Its own, with the cause's where Hydra adds that when it reports."""
    cause = error.__cause__ if isinstance(error, CompactHydraException) else None
    return "\n".join(str(one).partition("full_key: ")[0] for one in (error, cause) if isinstance(one, BaseException))


def _joined(text: str) -> str:
    return " ".join(text.split())

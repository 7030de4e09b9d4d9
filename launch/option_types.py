"""Whether the values of a config are of the types that their takers' annotations name, and their takers allowed.

`true` is no number, a number no text, and where a number stands it is finite. Hydra reads `no` and `off` as texts, which Python
would read as true.
"""

import difflib
import importlib
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

# A config names what is built of it, and that of a run may be somebody else's. So nothing is built but classes of these
# packages and of those that the user's environment adds, and functions of these modules.
PACKAGES = ("callbacks", "datamodules", "lightning_modules", "stillhouse")
FUNCTIONS = ("callbacks.loggers.wandb_logger", "stillhouse.diffusion.schedules")
ADDED = "STILLHOUSE_PACKAGES"

_TARGET, _PARTIAL = "_target_", "_partial_"
_PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_LISTED = 20


class UnknownOption(ValueError):
    """An option (`key`) that is none of those that its `owner` has."""

    def __init__(self, key: str, name: str, known: Sequence[str], owner: str):
        names = [one for one in known if not one.startswith("_")]
        close = difflib.get_close_matches(name, names, 1)
        listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "") if names else "no options"
        super().__init__(f"{key} is unknown: " + (f"did you mean {close[0]}?" if close else f"{owner} takes {listed}"))
        self.key, self.owner = key, owner


def check_node(node: DictConfig) -> None:
    """A node with a `_target_`, and all nodes in it, none of which is built.

    Raises:
        ValueError: For a target that may not be built, an option that it does not have, or one of the wrong type.
    """
    key = _key(node)
    target = find_target(str(node[_TARGET]), key)
    hydra_keys = {_TARGET: str, _PARTIAL: bool}
    _check_members(node, hydra_keys | parameters(target), key, target.__name__)


def check_targets(node: Any) -> None:
    """A node of whatever kind: every node in it that has a target.

    Raises:
        ValueError: As `check_node`.
    """
    for child in _children(node) if isinstance(node, DictConfig | ListConfig) and _TARGET not in node else [node]:
        if isinstance(child, DictConfig) and _TARGET in child:
            check_node(child)
        elif isinstance(child, DictConfig | ListConfig):
            check_targets(child)


@cache
def parameters(target: Any) -> dict[str, Any]:
    """The options that a class or function accepts by name, with their types; of a class also those it hands to its bases."""
    types_by_name: dict[str, Any] = {}
    for function in _constructors(target) if isinstance(target, type) else [target]:
        hints = typing.get_type_hints(function)
        options = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        types_by_name = {
            p.name: hints.get(p.name, Any) for p in options if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        } | types_by_name
        if not any(p.kind == p.VAR_KEYWORD for p in options):
            break
    return types_by_name


def _constructors(target: type) -> Iterator[Any]:
    for base in target.__mro__:
        if "__init__" in vars(base) and base.__module__.partition(".")[0] not in ("builtins", "torch"):
            yield vars(base)["__init__"]


def find_target(name: str, key: str) -> Any:
    """The class or function that the option `key` names by `_target_`.

    Raises:
        ValueError: For one that may not be built, or is not there.
    """
    packages = [*PACKAGES, *filter(None, os.environ.get(ADDED, "").split(","))]
    if name.partition(".")[0] not in packages:
        raise ValueError(
            f"{key}._target_={name} is not built: a config may name classes of {', '.join(packages)} alone; for a package of "
            f"your own set {ADDED}={name.partition('.')[0]} in the environment"
        )
    module, _, last = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}._target_={name} does not exist ({error})") from error
    home = getattr(target, "__module__", "")
    if not (
        (isinstance(target, type) and home.partition(".")[0] in packages)
        or (inspect.isfunction(target) and home in FUNCTIONS)
    ):
        raise ValueError(f"{key}._target_={name} is not built: it is no class of {', '.join(packages)}")
    return target


def _check_members(node: DictConfig, kinds: Mapping[str, Any], key: str, owner: str) -> None:
    for name in node:
        if name not in kinds:
            raise UnknownOption(_joined(key, name), str(name), list(kinds), owner)
    for name, kind in kinds.items():
        if name in node and not OmegaConf.is_missing(node, name):
            check_value(_source(node, name), node[name], kind)


def check_value(key: str, value: Any, kind: Any) -> None:
    """Check a value, and what is in it, against a type.

    Raises:
        ValueError: For a value, or something in it, that is not of a type (an annotation); `key` is its option.
    """
    fitting = [one for one in _alternatives(kind) if _fits(value, one)]
    if not fitting:
        raise ValueError(f"{key}={shown(value)}: {_way_out(value, kind)}")
    if not isinstance(value, DictConfig | ListConfig):
        return
    for one in fitting:
        if typing.is_typeddict(one):
            missing = [name for name in typing.get_type_hints(one) if name in one.__required_keys__ - set(value)]
            if missing:
                raise ValueError(f"{_joined(_key(value), missing[0])} is missing: {key} needs it")
            return _check_members(value, typing.get_type_hints(one), _key(value), key)
    if isinstance(value, DictConfig) and _TARGET in value:
        return check_node(value)
    inner = typing.Union[tuple(_inside(one) for one in fitting)]  # noqa: UP007
    if isinstance(value, ListConfig):
        for child in filter(OmegaConf.is_config, value):
            check_value(_key(child), child, inner)
        return
    for name in value:
        if not OmegaConf.is_missing(value, name):
            check_value(_source(value, name), value[name], inner)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, but for what is in a dict; of a node, whether it may be one that builds such a thing."""
    origin = typing.get_origin(kind) or kind
    if kind is Any or kind is object:
        return True
    if kind is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in typing.get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (bool, int):
        return type(value) is kind
    if kind in (str, Path):
        return isinstance(value, str)
    if typing.is_typeddict(kind) or origin in (dict, Mapping):
        return isinstance(value, DictConfig) and _TARGET not in value
    if origin in (list, tuple, Sequence):
        if not isinstance(value, ListConfig) or (origin is tuple and len(value) != len(typing.get_args(kind))):
            return False
        return all(any(_fits(one, inner) for inner in _alternatives(_inside(kind))) for one in value)
    if isinstance(value, DictConfig):
        return _TARGET in value
    return not isinstance(value, ListConfig | str | float | int | None)  # else it is built already (launch/run/plan.py)


def _inside(kind: Any) -> Any:
    """The type of the values of a mapping or list, which are all of one."""
    arguments = typing.get_args(kind)
    return arguments[-1] if arguments else Any


def _alternatives(kind: Any) -> list[Any]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [one for part in typing.get_args(kind) for one in _alternatives(part)] if union else [kind]


# -- what is said -----------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """As one would type it."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(shown, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _way_out(value: Any, kind: Any) -> str:
    kinds = [one for one in _alternatives(kind) if one is not Path]
    words = list(dict.fromkeys(_in_words(one) for one in kinds if not _built(one)))
    if built := [one for one in kinds if _built(one)]:
        words.insert(0, _configs("a config", built))
    text = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if set(kinds) <= {str, type(None)} and isinstance(value, bool | int | float):
        text += f", here in quotes of its own: \"'{shown(value)}'\""
    return f"say {text}" if kinds == [bool] else f"give {text}"


def _in_words(kind: Any, plural: bool = False) -> str:
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is type(None):
        return "null"
    if kind in _PLAIN:
        return _PLAIN[kind].removeprefix("a ") + "s" if plural else _PLAIN[kind]
    if origin is typing.Literal:
        return "one of " + ", ".join(map(shown, inner)) if len(inner) > 1 else shown(inner[0])
    if origin in (list, tuple, Sequence):
        listed = " or ".join(dict.fromkeys(_in_words(one, plural=True) for one in _alternatives(_inside(kind))))
        return f"{'lists' if plural else 'a list'} of {f'{len(inner)} ' if origin is tuple else ''}{listed}"
    if typing.is_typeddict(kind):
        return "{" + ", ".join(f"{name}: ..." for name in typing.get_type_hints(kind)) + "}"
    if origin in (dict, Mapping):
        return "{name: " + " or ".join(_in_words(one) for one in _alternatives(_inside(kind))) + "}"
    return _configs("configs" if plural else "a config", [kind])


def _configs(what: str, kinds: Sequence[Any]) -> str:
    names = [getattr(kind, "__name__", str(kind)) for kind in kinds]
    return f"{what} of type {' or '.join(names)} ({{_target_: ...}}, or ${{...}} where it stands elsewhere)"


def _built(kind: Any) -> bool:
    """Whether it is made of a config with a target."""
    origin = typing.get_origin(kind) or kind
    plain = (type(None), typing.Literal, list, tuple, Sequence, dict, Mapping, *_PLAIN)
    return origin not in plain and not typing.is_typeddict(kind)


def _children(node: DictConfig | ListConfig) -> Iterator[Any]:
    if isinstance(node, ListConfig):
        yield from node
        return
    for name in node:
        if not OmegaConf.is_missing(node, name):
            yield node[name]


def _key(node: Any) -> str:
    parts = []
    while node is not None and node._key() is not None:
        place, node = node._key(), node._get_parent()
        parts.append(f"[{place}]" if isinstance(node, ListConfig) else f".{place}")
    return "".join(reversed(parts)).removeprefix(".")


def _joined(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _source(node: DictConfig, name: Any) -> str:
    """The option that a value is set by: that which an interpolation names, and so on."""
    key, root = _joined(_key(node), name), node._get_root()
    while isinstance(node, DictConfig) and name in node:
        reference = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(node._get_node(name)._value()))
        if not reference:
            break
        key = reference[1]
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(root, parent) if parent else root
    return key

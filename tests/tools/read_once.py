"""To import it makes PyYAML and OmegaConf read a text only once: composing a config is a large part of many tests, and half of
that is reading the same files and interpolations again."""

import copy
import functools
from typing import Any

import omegaconf.base
import yaml

_loaded: dict[tuple[Any, str], Any] = {}
_load = yaml.load


def _load_once(stream: Any, Loader: type) -> Any:
    text = stream if isinstance(stream, str | bytes) else stream.read()
    key = text, Loader.__name__  # for OmegaConf makes its class anew at each call
    if key not in _loaded:
        _loaded[key] = _load(text, Loader)
    return copy.deepcopy(_loaded[key])


yaml.load = _load_once
omegaconf.base.parse = functools.cache(omegaconf.base.parse)  # a tree that nobody changes

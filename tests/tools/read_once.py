"""To import it makes OmegaConf and Hydra read a text only once: composing a config is a large part of many tests, and most of
that is reading the same files and interpolations again."""

import functools
import io
import pickle
from pathlib import Path
from typing import Any

import hydra._internal.defaults_list
import omegaconf._utils
import omegaconf.base
from omegaconf import OmegaConf

_loaded: dict[str, bytes] = {}
_load = OmegaConf.load
_interpolation_map = hydra._internal.defaults_list._create_interpolation_map


def _load_once(file: Any) -> Any:
    text = Path(file).read_text("utf-8") if isinstance(file, str | Path) else file.read()
    if text not in _loaded:
        _loaded[text] = pickle.dumps(_load(io.StringIO(text)))
    return pickle.loads(_loaded[text])  # a tenth of a copy's time


def _map_where_needed(overrides: Any, defaults: list, self_added: bool) -> Any:
    """All choices made so far, which is slow to collect: only for those who look something up there."""
    if any(default.is_interpolation() for default in defaults if not default.is_self()):
        return _interpolation_map(overrides, defaults, self_added)
    return None


OmegaConf.load = staticmethod(_load_once)
hydra._internal.defaults_list._create_interpolation_map = _map_where_needed
omegaconf.base.parse = omegaconf._utils.parse = functools.cache(omegaconf.base.parse)  # a tree that nobody changes

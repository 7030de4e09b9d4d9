"""Stand-ins for packages that a program imports and does not use, so that they need not be there."""

import sys
from collections.abc import Collection
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class _StandIn(ModuleType):
    """A module that has every name; what they name can be subclassed and called, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _StandIns(MetaPathFinder, Loader):
    def __init__(self, packages: Collection[str]):
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(unused: Collection[str], unused_if_absent: Collection[str]) -> None:
    """From now on imports of these packages give stand-ins.

    Args:
        unused: Also where they are installed.
        unused_if_absent: Only where they are not, since other packages make use of them.
    """
    absent = {name for name in unused_if_absent if find_spec(name) is None}
    sys.meta_path.insert(0, _StandIns({*unused, *absent}))

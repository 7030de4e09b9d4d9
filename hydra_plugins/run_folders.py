"""Run folders as choices: teacher=runs/NAME is the student of that run, data=runs/NAME the data that it was trained on.

Hydra looks for a choice in the folders of its search path and then here, so overrides, sweeps and TAB completion know both kinds.
"""

import os
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parent.parent / "conf"


class RunFolders(ConfigSource):
    @staticmethod
    def scheme() -> str:
        return "runs"

    def load_config(self, config_path: str) -> ConfigResult:
        from launch.run.teachers import from_run

        config = OmegaConf.create(from_run(*self._split(config_path)))
        return ConfigResult(self.provider, self.full_path(), config, header={"package": "_global_"})

    def is_config(self, config_path: str) -> bool:
        """Whether it is GROUP/PLACE/NAME, as a folder has and no choice of the group; load_config says whether a run is there."""
        group, name = self._split(config_path)
        inner = {path.name for path in (CONF / group).glob("*/")} if self.is_group(group) else ()
        return self.is_group(group) and "/" in name and name.partition("/")[0] not in inner

    def is_group(self, config_path: str) -> bool:
        return config_path in ("teacher", "data")

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The finished runs in runs/, for TAB completion alone: --help and messages name what conf/ has."""
        if config_path != "teacher" or results_filter == ObjectType.GROUP or "COMP_LINE" not in os.environ:
            return []
        return sorted(str(file.parent) for depth in ("*", "*/*") for file in Path("runs").glob(f"{depth}/student.json"))

    def available(self) -> bool:
        return True

    @staticmethod
    def _split(config_path: str) -> tuple[str, str]:
        group, _, name = config_path.partition("/")
        return group, name if name == "/" else name.rstrip("/")


class RunFolderSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("stillhouse", "runs://")

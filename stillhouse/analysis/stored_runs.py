"""What a comparison reads of a run's folder."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from stillhouse.metrics.records import Record


class StoredRun(Protocol):
    """The folder of a run or, without a config, of a measured teacher; `launch.run.folder.RunFolder` is one.

    Attributes:
        path: The folder.
        config: Its config.yaml.
        metrics: Its metrics.json.
        monitoring: Its monitoring.json.
    """

    path: Path
    config: Path
    metrics: Path
    monitoring: Path

    @property
    def name(self) -> str:
        """Return the folder's name."""

    def plain_config(self) -> dict[str, Any]:
        """Return the run's config in plain containers.

        Raises:
            ValueError: For a damaged one.
            FileNotFoundError: Where there is none.
        """

    def check_complete(self) -> None:
        """Check that the run has reached its end.

        Raises:
            ValueError: Where it has not.
        """

    def final_records(self) -> list[Record]:
        """Return the records of the final evaluation.

        Raises:
            ValueError: For a run that is not complete, and for damaged records.
        """

    def later_records(self, final: Iterable[Record]) -> tuple[list[Record], list[str]]:
        """Return the records that evaluate.py made of the weights of `final_records`, and a line for each other one, left out.

        Raises:
            ValueError: For damaged records.
        """


def distinct_names(folders: Iterable[StoredRun]) -> dict[Path, str]:
    """Return the folders' names by their paths; the path itself where several have one name, as exp1/seed0 and exp2/seed0."""
    names = {folder.path: folder.name for folder in folders}
    counts = Counter(names.values())
    return {path: name if counts[name] == 1 else str(path) for path, name in names.items()}

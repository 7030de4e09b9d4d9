"""Published files that a teacher's weights are made of, once, by conversion."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillhouse.checkpoints.inert_pickle import shown
from stillhouse.checkpoints.weights import check_state, find_file, hash_file, places, save_weights


class PublishedCheckpoint:
    """Base: a published file, read into the names and shapes of our networks. Nothing is fetched here, and no code of it runs.

    file: sought as weights are. url: where it can be had, for messages and cards; `download=true` fetches it. sha256: of the
    file, 64 hex digits, checked before it is read.
    """

    def __init__(self, file: str, url: str | None = None, sha256: str | None = None):
        self.file = file
        self.url = url
        self.sha256 = sha256

    @property
    def name(self) -> str:
        """Stem of the weights that are made of it. Others, as a student's that is still to be trained, are never made of it."""
        return Path(self.file).stem

    def read(
        self, file: Path, network: nn.Module, preconditioning: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state dict for `network`, by its own names, and what the card should say of the file.

        Errors: OSError for a damaged file, ValueError for one that is of another network or preconditioning, or refused.
        """
        raise NotImplementedError

    def provide(self, weights: str, network: nn.Module, preconditioning: nn.Module, licence: str) -> None:
        """Make the file `weights` for that network, with its card, unless it is there; several processes may do it at once.

        Errors: FileNotFoundError where neither file is there, OSError for another hash, and those of `read`.
        """
        if find_file(weights) is not None:
            return
        missing = f"no weights at {' or '.join(map(str, places(weights)))}"
        if Path(weights).stem != self.name:
            raise FileNotFoundError(
                f"{missing}, and {self.file} becomes only {self.name}.safetensors; train them first, or set teacher.weights"
            )
        file = find_file(self.file)
        if file is None:
            way = f"add download=true to fetch {self.url}, or put the file there" if self.url else "put the file there"
            raise FileNotFoundError(
                f"{missing}, nor {places(self.file)[0]} that they are made of; {way}, "
                "or set teacher.weights (null: random weights)"
            )
        found = hash_file(file)
        if self.sha256 is not None and found != self.sha256.lower():
            raise OSError(
                f"{file} has SHA-256 {found}, expected {self.sha256}; delete and fetch it again, or correct teacher.source.sha256"
            )
        state, facts = self.read(file, network, preconditioning)
        check_state(file, state, network)
        card = {"source": {"file": file.name, "sha256": found, "url": self.url, **facts}, "licence": licence}
        with suppress(FileExistsError):  # another process was faster
            save_weights(places(weights)[0], state, card)


def check_equal(file: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Errors: ValueError, one line, for the first of `pairs`, by option (the file's value, the configured one), that differs."""
    for option, (theirs, ours) in pairs.items():
        if isinstance(theirs, Tensor) or theirs != ours:  # two tensors are not equal or unequal
            raise ValueError(
                f"{file} has {option}={shown(theirs)}, the configured teacher {ours!r}; choose another teacher or file"
            )

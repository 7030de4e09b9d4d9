"""Published files that a teacher's weights are made of, once, by conversion."""

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.checkpoints.bounds import check_archive, check_tensors
from stillhouse.checkpoints.inert_pickle import shown
from stillhouse.checkpoints.weights import check_state, did_you_mean, find_file, hash_file, places, save_weights


class PublishedCheckpoint:
    """Base of published files, read into the names and shapes of our networks. Nothing is fetched, and no code in them runs.

    Args:
        file: sought as weights are (`find_weights`).
        url: where it can be had, for messages and cards; `download=true` fetches it.
        sha256: of the file, 64 hex digits, checked before it is read.
    """

    def __init__(self, file: str, url: str | None = None, sha256: str | None = None):
        self.file = file
        self.url = url
        self.sha256 = sha256

    @property
    def name(self) -> str:
        """Stem of the weights that are made of it; others, such as those of a student in training, never are."""
        return Path(self.file).stem

    def read(
        self, file: Path, network: nn.Module, preconditioning: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the file as a state dict.

        Args:
            file: where it was found.
            network: the network that is configured.
            preconditioning: the preconditioning that is configured.

        Returns:
            The state dict by the network's names, and what the card should say of the file.

        Raises:
            OSError: for a damaged file.
            ValueError: for one that is of another network or preconditioning, or refused.
        """
        raise NotImplementedError

    def provide(self, weights: str, network: nn.Module, preconditioning: nn.Module, licence: str) -> None:
        """Make a file of weights with its card, unless it is there; several processes may do it at once.

        Args:
            weights: the file to make.
            network: the network that is configured.
            preconditioning: the preconditioning that is configured.
            licence: of the weights, for the card.

        Raises:
            FileNotFoundError: where neither file is there.
            OSError: for another hash, or a damaged file.
            ValueError: as `read`.
        """
        if find_file(weights) is not None:
            return
        missing = f"no weights at {' or '.join(map(str, places(weights)))}"
        if Path(weights).stem != self.name:
            raise FileNotFoundError(
                f"{missing}{did_you_mean(weights)}, and {self.file} becomes only {self.name}.safetensors; train them first, "
                "or set teacher.weights"
            )
        file = find_file(self.file)
        if file is None:
            way = f"add download=true to fetch {self.url}, or put the file there" if self.url else "put the file there"
            raise FileNotFoundError(
                f"{missing}, nor {places(self.file)[0]} that they are made of; {way}, "
                "or set teacher.weights (null: random weights)"
            )
        sha256 = hash_file(file)
        if self.sha256 is not None and sha256 != self.sha256.lower():
            raise OSError(
                f"{file} has SHA-256 {sha256}, expected {self.sha256}; "
                "delete and fetch it again, or correct teacher.source.sha256"
            )
        state, facts = self.read(file, network, preconditioning)
        check_state(file, state, network)
        card = {"source": {"file": file.name, "sha256": sha256, "url": self.url, **facts}, "licence": licence}
        with suppress(FileExistsError):  # another process was faster
            save_weights(places(weights)[0], state, card)


def load_tensors(file: Path) -> Any:
    """Read what torch.save wrote: tensors in plain containers, with sizes in proportion to the file's.

    Raises:
        OSError: for a damaged file.
        ValueError: for one that holds more than tensors and plain values; nothing in it was executed.
    """
    try:
        check_archive(file)
        return check_tensors(torch.load(file, map_location="cpu", weights_only=True), file)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} was refused: it is no file of tensors alone, and nothing in it was executed"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> OSError:
    """Say in one line that a file is damaged, with the first line of what its reader said."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return OSError(f"{file} is damaged or cut short ({reason}); delete it and fetch it again")


def check_equal(file: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Compare what a published file says with what is configured.

    Args:
        file: the file, for the message.
        pairs: by option, the file's value and the configured one.

    Raises:
        ValueError: in one line, for the first pair that differs.
    """
    for option, (published, configured) in pairs.items():
        if isinstance(published, Tensor) or published != configured:  # two tensors are not equal or unequal
            raise ValueError(
                f"{file} has {option}={shown(published)}, the configured teacher {configured!r}; choose another teacher or file"
            )

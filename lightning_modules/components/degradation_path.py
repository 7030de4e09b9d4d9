"""A degradation path on disk: the denoisers that a teacher passes on its way to the distribution of an untrained generator."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from stillhouse.checkpoints.weights import load_weights, read_card, save_weights
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.teacher import Teacher
from stillhouse.file_locks import wait_for_lock

SPACINGS = ("geometric", "linear")


def node_steps(nodes: int, steps: int, spacing: str) -> list[int]:
    """After which of `steps` training steps the `nodes` nodes are kept, ascending, the last one being `steps`.

    "geometric": steps^(n / nodes), since degradation is fastest at the beginning; "linear": steps n / nodes.

    Raises:
        ValueError: Where two nodes would fall on one step.
    """
    check_counts(**{"method.nodes": nodes, "method.degradation.steps": steps})
    check_choice("method.degradation.spacing", spacing, SPACINGS)
    if nodes > steps:
        raise ValueError(
            f"method.nodes={nodes} do not fit into method.degradation.steps={steps}: take fewer nodes or more steps"
        )
    share = np.arange(1, nodes + 1) / nodes
    chosen = [round(step) for step in (steps**share if spacing == "geometric" else steps * share)]
    if sorted(set(chosen)) != chosen or chosen[0] < 1:
        raise ValueError(
            f"method.nodes={nodes} do not fit into method.degradation.steps={steps} ({spacing}: {chosen}): "
            "take fewer nodes or more steps"
        )
    return chosen


class DegradationPath:
    """The networks s'_1 .. s'_N that start as the teacher and are fitted to its untrained generator's samples.

    Node n is `node-STEP.safetensors` with a card. The folder's name holds the hashes of the teacher, of the untrained
    generator and of `settings`, which is all else that decides the weights; the number of nodes does not, so a longer or
    finer path extends the same folder, and every run of that teacher, generator and settings shares it.

    Args:
        root: The folder of all paths.
        teacher: s'_0.
        generator_hash: Of the untrained generator.
        steps: After which training steps nodes are kept.
        settings: All else that decides the weights, as values that JSON can hold.
    """

    def __init__(
        self, root: str | Path, teacher: Teacher, generator_hash: str, steps: list[int], settings: dict[str, Any]
    ):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.teacher = teacher
        self.steps = steps
        self.identity = {"teacher": teacher.hash, "generator": generator_hash, "settings": settings}
        self.form = teacher.form
        self.folder = Path(root) / f"{teacher.name}-{teacher.hash[:8]}-{generator_hash[:8]}-{digest[:8]}"

    def file(self, step: int) -> Path:
        return self.folder / f"node-{step:06d}.safetensors"

    def complete(self) -> bool:
        return all(self.file(step).exists() for step in self.steps)

    def save(self, step: int, network: nn.Module, images: int, seconds: float) -> None:
        """Keep the network as node `step`, unless it is there already.

        Args:
            step: In training steps.
            network: With the node's weights.
            images: Trained on until here.
            seconds: Of training until here.

        Raises:
            OSError: Where the disk refuses.
            FloatingPointError: For weights that are not numbers.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Jobs at once may record one path: the weights of one must not meet the card of another.
        lock = wait_for_lock(self.folder / "lock", f"{self.folder}: another process records it, waiting")
        try:
            if self.file(step).exists():
                return
            if not all(value.isfinite().all() for value in network.state_dict().values()):
                raise FloatingPointError(
                    f"the degradation path diverged before its step {step}: lower method.degradation.lr"
                )
            cost = {"steps": step, "images": images, "seconds": seconds}
            card = {"teacher_name": self.teacher.name, **self.identity, "form": self.form}
            card |= {"cost": cost, "licence": self.teacher.licence}
            save_weights(self.file(step), network.state_dict(), card)
        finally:
            lock.release()

    def load(self, step: int, network: nn.Module, verify: bool = False) -> None:
        """Put node `step` into `network`.

        Args:
            step: In training steps.
            network: Of the teacher's form.
            verify: Compare the whole file with its hash instead of some blocks.

        Raises:
            FileNotFoundError: For a missing node.
            ValueError: For one of another path.
            OSError: For a damaged one.
        """
        card = self._card(step)
        form = {"form": self.form} if "form" in card else {}  # earlier versions did not note it
        for key, value in {**self.identity, **form}.items():
            if card.get(key) != value:
                raise ValueError(
                    f"{self.file(step)} belongs to another degradation path ({key} {card.get(key)!r} instead of {value!r}): "
                    "move that folder away, and the path is recorded again"
                )
        try:
            load_weights(self.file(step), network, card["sha256"] if verify else None)
        except OSError as error:
            raise OSError(
                f"the degradation path's node {self.file(step)} is damaged: delete the file and run again, it is recorded again"
            ) from error

    def cost(self) -> dict[str, float]:
        """{"steps", "images", "seconds"} of the recording up to the last node."""
        return self._card(self.steps[-1])["cost"]

    def _card(self, step: int) -> dict[str, Any]:
        if not self.file(step).exists():
            raise FileNotFoundError(
                f"the degradation path has no node {self.file(step)}: run again without removing it, and it is recorded again"
            )
        return read_card(self.file(step))

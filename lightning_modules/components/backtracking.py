"""Distribution backtracking (DisBack, Zhang et al., arXiv 2408.15991, algorithms 1 and 2): a path of targets for any method that
matches a generator's distribution to a teacher's by a fake score."""

import hashlib
import math
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_modules.components.degradation_path import DegradationPath, node_steps
from lightning_modules.components.degradation_recording import DegradationRecording
from lightning_modules.components.method import Method
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.noise_levels import NoiseLevelDistribution
from stillhouse.diffusion.teacher import Teacher
from stillhouse.ranks import average_over_ranks

SWITCHES = ("interval", "converged")


class DegradationOptions(TypedDict):
    """The options `method.degradation`, of stage 1; lr None: the fake score's."""

    steps: int
    lr: float | None
    batch_size: int
    seed: int
    spacing: str


_COMPARE_EVERY = 10  # generator updates; each comparison of the mismatch waits for the device
_NEWEST = 0.2  # the share of the newest value in the mismatch's running mean


class Backtracking(Method):
    """Base of the methods with a target score and a fake score: follows the teacher's degradation path backwards.

    Stage 1 records the path s'_0 (the teacher) .. s'_N (`DegradationRecording`). In stage 2 the fake score starts as s'_N,
    and the targets are T_i = s'_{N-i} for i = 1 .. N, the last one the teacher itself. The next one comes

    - with switch "interval" after every `interval` generator updates;
    - with switch "converged" when the mismatch of fake score and target (a running mean, compared every 10 generator updates)
      is at most `tolerance` times what it was when first compared since the last switch; after `interval` updates at the latest.

    A subclass logs "loss/mismatch" with each generator update, and calls `set_target` once it has its networks.

    Attributes:
        target: What the generator follows now; without a path the teacher.
        fake_score: Of the generator's images.
    """

    teacher: Teacher
    target: Teacher
    fake_score: Denoiser

    def __init__(
        self,
        *,
        nodes: int = 0,
        interval: int = 30,
        degradation: DegradationOptions | None = None,
        switch: str = "interval",
        tolerance: float = 0.5,
        store: str = "data/degradation",
        **common: Any,
    ):
        """Args beside those of `Method`.

        Args:
            nodes: N; with 0 there is no path, and the teacher is the target.
            interval: In generator updates.
            degradation: `steps`, `lr`, `batch_size`, `seed` and `spacing` of stage 1; None where there is no path.
            switch: "interval" or "converged".
            tolerance: In (0, 1).
            store: The folder of all recorded paths.

        Raises:
            ValueError: For options out of range.
        """
        super().__init__(**common)
        check_counts(0, **{"method.nodes": nodes})
        check_counts(**{"method.interval": interval})
        check_choice("method.switch", switch, SWITCHES)
        if not 0 < tolerance < 1:
            raise ValueError(f"method.tolerance must lie in (0, 1), got {tolerance!r}")
        if nodes and not degradation:
            raise ValueError(
                f"method.nodes={nodes} needs method.degradation, how the path is recorded; nodes=0: no path"
            )
        self.nodes, self.interval, self.switch, self.tolerance = nodes, interval, switch, tolerance
        self.degradation, self.store = degradation, store
        self.node = min(1, nodes)
        self.last_switch = 0  # in generator updates
        self.mismatch: Tensor | None = None  # its running mean since then
        self.first_mismatch: float | None = None
        self.path: DegradationPath | None = None

    def set_target(self, sigma_init: float, sigmas: NoiseLevelDistribution) -> None:
        """Set the target, and describe the path to it.

        Args:
            sigma_init: The noise level at which the untrained generator, the teacher, is evaluated.
            sigmas: Distribution of the noise level in the fake score's loss.

        Raises:
            ValueError: For nodes that do not fit into stage 1.
        """
        self.target = self.teacher
        if not self.nodes:
            return
        fake_lr = self.learning_rate("fake_score")
        recording = {"sigma_init": sigma_init, "sigmas": sigmas, "betas": self.betas, **self.degradation}
        self.recording = recording | {"lr": fake_lr if recording["lr"] is None else recording["lr"]}
        self.path = self.degradation_path()
        self.target = self.teacher.replica()

    def degradation_path(self) -> DegradationPath:
        """The path of this teacher, generator and settings in the folder `store`."""
        settings = dict(self.recording)
        steps = node_steps(self.nodes, settings.pop("steps"), settings.pop("spacing"))
        generator = hashlib.sha256(f"{self.teacher.hash} at {settings.pop('sigma_init')!r}".encode()).hexdigest()
        settings = {key: repr(value) for key, value in settings.items()} | {"num_classes": self.teacher.num_classes}
        return DegradationPath(self.store, self.teacher, generator, steps, settings)

    def frozen_networks(self) -> list[Teacher]:
        return [self.target]

    @property
    def path_updates(self) -> int:
        """Updates of the student after which its target is the teacher, with "converged" at the latest."""
        return (self.nodes - 1) * self.interval

    @property
    def target_evaluations(self) -> float:
        """Network evaluations of one of the target's estimates, on average; with "converged" the fewest."""
        share = sum("student" in names for names in self.update_cycle) / len(self.update_cycle)
        before = min(self.path_updates / (share * self.total_steps), 1.0) if self.nodes else 0.0
        return 1.0 + (1.0 - before) * (self.teacher.evaluations_per_estimate - 1)

    # -- stage 1 ---------------------------------------------------------------------------------------------------

    def stages(self) -> dict[str, Method]:
        if self.path is None:
            return {}
        options = dict(self.recording)
        kimg = options.pop("steps") * options["batch_size"] / 1000
        options.pop("spacing")
        return {"degradation": DegradationRecording(self.path, name="degradation", kimg=kimg, **options)}

    def stored_bytes(self, network: int) -> dict[str, int]:
        return {f"degradation path of {self.nodes} nodes": network * self.nodes} if self.path else {}

    def preparation(self, folder: Path) -> dict[str, float] | None:
        return self.path.cost() if self.path else None

    # -- stage 2 ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Before a checkpoint is restored, which then has the last word."""
        super().setup(stage)
        if stage == "fit" and self.path:
            updates = self.student_updates_in(self.total_steps)
            if self.path_updates >= updates:
                rank_zero_warn(
                    f"the teacher itself becomes the target after {self.path_updates} updates of the student, "
                    f"and this run has {updates}: "
                    "with method.switch=interval it follows degraded scores to its end; lower method.nodes or method.interval"
                )
            for step in self.path.steps:  # a missing or damaged node shows now, not after hours
                self.path.load(step, self.target.denoiser.network, verify=getattr(self.data, "verify", False))
            self.fake_score.network.load_state_dict(self.target.denoiser.network.state_dict())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.mismatch is not None:
            self.mismatch = self.mismatch.to(self.device)
        if self.path:
            self.load_target()

    def load_target(self) -> None:
        """Put T_node into the one network that all targets share: the teacher itself stays off the device until the end.

        Where the teacher is guided, so is the last target; those before it are scores of images that nothing guides.
        """
        network = self.target.denoiser.network
        self.target.set_guidance(self.node == self.nodes)
        with self.target.exact_weights():
            if self.node == self.nodes:
                network.load_state_dict(self.teacher.denoiser.network.state_dict())
            else:
                self.path.load(self.path.steps[self.nodes - self.node - 1], network)

    def after_update(self) -> None:
        if self.path:
            self.means["score/node"] = float(self.node)  # that of this update
        if self.student_updated and self.node < self.nodes and self.switch_due(self.means["loss/mismatch"]):
            self.node, self.last_switch = self.node + 1, self.student_updates
            self.mismatch = self.first_mismatch = None
            self.load_target()

    def switch_due(self, mismatch: Tensor) -> bool:
        """Whether the next target is due, after a generator update with this mismatch, a scalar on the device."""
        updates = self.student_updates - self.last_switch
        if self.switch == "converged":
            before = mismatch if self.mismatch is None else self.mismatch
            # Of a step that a loss scale skips the mismatch may be infinite: it does not enter.
            known = torch.where(before.isfinite(), before, mismatch)
            mean = before.lerp(mismatch, _NEWEST)
            self.mismatch = torch.where(mean.isfinite(), mean, known)
            if updates % _COMPARE_EVERY == 0:
                total = self.mismatch.clone()
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(total)  # all ranks must switch together; a sum serves a ratio as well as a mean
                mismatch_now = total.item()
                if self.first_mismatch is None:
                    self.first_mismatch = mismatch_now if math.isfinite(mismatch_now) else None
                elif mismatch_now <= self.tolerance * self.first_mismatch:
                    return True
        return updates >= self.interval

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if not self.path:
            return
        mismatch = None
        if self.mismatch is not None:  # each rank goes on with the mean, whose sum over them is the same
            mismatch = average_over_ranks({"mismatch": self.mismatch}, self.device)["mismatch"].cpu()
        checkpoint["backtracking"] = {
            "node": self.node,
            "last_switch": self.last_switch,
            "mismatch": mismatch,
            "first_mismatch": self.first_mismatch,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.path:
            for key, value in checkpoint["backtracking"].items():
                setattr(self, key, value)

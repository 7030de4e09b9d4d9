"""Progressive distillation: halve the number of DDIM steps, again and again (Salimans & Ho, arXiv 2202.00512)."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks import EMA
from lightning_modules.components.branches import BranchedMethod
from lightning_modules.components.method import check_nfe
from lightning_modules.components.optimisation import Optimisation
from stillhouse.checkpoints import load_weights, save_weights
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.preconditioning import Epsilon
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.solvers import euler_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks.branching import collapse, plain_state, respread

# Weights of |x - D|^2 as functions of the SNR, 1 / sigma^2 (the paper's section 4).
WEIGHTINGS = {
    "truncated_snr": lambda snr: snr.clamp_min(1),
    "snr_plus_one": lambda snr: snr + 1,
    "snr": lambda snr: snr,
}


class ProgressiveDistillation(BranchedMethod):
    """Rounds that each teach a student to do in one DDIM step what its teacher does in `factor`; then it is the teacher.

    The round of N steps draws images x0, an index i uniform over the N upper levels of its grid, noise, x = x0 + sigma_i e,
    takes `factor` teacher steps from x at sigma_i to x'' at sigma'', and regresses the estimate for which one step lands there,

        (sigma_i x'' - sigma'' x) / (sigma_i - sigma''),

    the paper's inverted DDIM step divided by its signal scale; at sigma'' = 0 it is x'' itself, the paper's case i = 1.
    Each round's student starts as its teacher with a new optimiser, and its learning rate falls from `lr` to zero.

    start_steps: of the first teacher, on its own schedule, of which every coarser grid takes every n-th level. end_steps: of
    the last student. kimg: of all rounds together; those to `long_rounds` steps or fewer take twice as much of it as others.
    weighting: one of WEIGHTINGS. clip: whether samples are made of estimates clipped to [-1, 1], as released.
    One step is one batch of images. Every round's student is kept in the run's folder, as rounds/N.safetensors.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        start_steps: int,
        end_steps: int = 1,
        factor: int = 2,
        long_rounds: int = 2,
        weighting: str = "truncated_snr",
        clip: bool = True,
        **common,
    ):
        super().__init__(**common)
        check_counts(**{"method.start_steps": start_steps, "method.end_steps": end_steps})
        check_counts(2, **{"method.factor": factor})
        check_counts(0, **{"method.long_rounds": long_rounds})
        check_choice("method.weighting", weighting, WEIGHTINGS)
        if weighting != "snr" and isinstance(teacher.denoiser.preconditioning, Epsilon):
            raise ValueError(
                f"method.weighting={weighting} diverges for a network that predicts the noise, whose error in x0 grows with "
                "sigma; use method.weighting=snr, or a teacher that predicts x0 or v"
            )
        self.teacher = teacher
        self.student = teacher.student().eval()  # no dropout, as released
        self.guide = teacher.student().eval().requires_grad_(False)  # the current round's teacher
        self.widen_student(factor)
        self.weighting, self.clip = weighting, clip
        self.grid = teacher.sigmas(start_steps)
        if len(self.grid) != start_steps + 1:
            raise ValueError(
                f"method.start_steps={start_steps}: the teacher's schedule has {len(self.grid) - 1} steps there"
            )
        self.rounds = halvings(start_steps, end_steps, factor)
        self.ends = shares(self.total_steps, [2 if steps <= long_rounds else 1 for steps in self.rounds])
        self.round = 0

    @property
    def steps(self) -> int:
        """The current student's."""
        return self.rounds[self.round]

    @property
    def evaluations(self) -> dict[str, float]:
        return {"student": 1.0, "teacher": float(self.substeps)}

    @property
    def progress(self) -> float:
        """Of the current round."""
        start = self.ends[self.round - 1] if self.round else 0
        return (self.trainer.global_step - start) / (self.ends[self.round] - start)

    def lr_scale(self) -> float:
        return super().lr_scale() * (1 - self.progress)

    def levels(self) -> Tensor:
        """The current student's noise levels (N, factor + 1): row i has those of the teacher's steps inside its step i."""
        stride = (len(self.grid) - 1) // (self.steps * self.substeps)
        fine = self.grid[::stride]
        return fine.unfold(0, self.substeps + 1, self.substeps)

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The original teacher stays where it is: its copy teaches the first round."""
        if any(isinstance(callback, EMA) for callback in self.trainer.callbacks):
            raise ValueError("an average would mix the students of several rounds: set callbacks.ema=null")
        Optimisation.on_fit_start(self)
        self.table = self.levels().to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.ends[self.round]:
            self.promote()
        super().on_train_batch_start(batch, batch_idx)

    def promote(self) -> None:
        """The student becomes the teacher, and starts anew as its copy."""
        self.guide.network.load_state_dict(plain_state(self.student.network))
        respread(self.student.network)
        self.optimizers().optimizer.state.clear()
        self.round += 1
        self.table = self.levels().to(self.device)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, labels = batch["image"], batch.get("label")
        random = TrainingNoise(self.seed, batch["position"], images.shape[1:])
        sigmas = self.table[random.indices(self.steps)]
        # In double precision: at the top of a cosine schedule sigma is 2e4, and the target a difference of such numbers.
        x = noised(images.double(), sigmas[:, 0], random.noise)
        targets = self.targets(x, sigmas, labels)
        estimates = self.student.branches(x, sigmas[:, 0], labels)
        weight = WEIGHTINGS[self.weighting](sigmas[:, :1] ** -2)
        loss = self.branch_loss((weight * (estimates - targets).square().flatten(2).mean(2)).float())
        self.log_mean("loss/student", loss.detach())
        self.log_mean("progress/steps", float(self.steps))
        return loss

    @torch.no_grad()
    def targets(self, x: Tensor, sigmas: Tensor, labels: Tensor | None) -> Tensor:
        """What each branch should estimate, (B, K, C, H, W), of x (B, C, H, W) at the first of sigmas (B, factor + 1)."""
        levels = sigmas[:, :, None, None, None].unbind(1)
        state, found = x, []
        for step in range(1, self.substeps + 1):
            estimate = self.guide(state, sigmas[:, step - 1], labels)
            state = euler_step(state, estimate, levels[step - 1], levels[step])
            if step % self.stride == 0:
                found.append((levels[0] * state - levels[step] * x) / (levels[0] - levels[step]))
        return torch.stack(found, 1)

    def after_update(self) -> None:
        """Keeps a round's student before any checkpoint of its last step is written: a kill between the two loses none."""
        if self.trainer.global_step == self.ends[self.round] and self.trainer.is_global_zero:
            card = {"method": self.name, "steps": self.steps, "round": self.round + 1, "seed": self.seed}
            card |= {"teacher": self.teacher.name, "licence": self.licence}
            folder = Path(self.trainer.default_root_dir)
            save_weights(kept_student(folder, self.steps), self.exported(), card, replace=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["round"] = self.round

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.round = checkpoint["round"]

    # -- sampling --------------------------------------------------------------------------------------------------

    def stored_bytes(self, network: int) -> dict[str, int]:
        return {f"students of {len(self.rounds)} rounds": network * len(self.rounds)}

    def sampling(self, nfe: int | None = None) -> Sampling:
        check_nfe(nfe, self.steps)
        sigmas = self.grid[:: (len(self.grid) - 1) // self.steps].tolist()
        return Sampling(sigmas, self.student.preconditioning.prior_std(self.grid[0]).item(), clip=self.clip)

    def choose_steps(self, steps: int, folder: Path) -> str | None:
        path = kept_student(folder, steps)
        if steps not in self.rounds or not path.exists():
            there = [n for n in self.rounds if kept_student(folder, n).exists()]
            raise ValueError(
                f"steps={steps}: {folder} has students of {', '.join(map(str, there)) or 'no'} steps so far"
            )
        collapse(self.student.network)
        load_weights(path.resolve(), self.student.network)
        self.round = self.rounds.index(steps)
        return "raw"


def kept_student(folder: Path, steps: int) -> Path:
    return folder / "rounds" / f"{steps}.safetensors"


def halvings(start: int, end: int, factor: int) -> list[int]:
    """The students' numbers of steps, start / factor down to end. Errors: ValueError where division does not lead there."""
    found = []
    steps = start
    while steps > end and steps % factor == 0:
        steps //= factor
        found.append(steps)
    if not found or steps != end:
        raise ValueError(
            f"method.start_steps={start} divided by method.factor={factor} again and again does not come to "
            f"method.end_steps={end}: make it {end} times a power of {factor}"
        )
    return found


def shares(total: int, parts: list[int]) -> list[int]:
    """The steps at which consecutive rounds end that share `total` steps as `parts` say.

    Errors: ValueError where a round would have none.
    """
    ends = [total * sum(parts[: i + 1]) // sum(parts) for i in range(len(parts))]
    if ends[0] == 0 or any(a == b for a, b in pairwise(ends)):
        raise ValueError(f"method.kimg gives {total} training steps, too few for {len(parts)} rounds; raise it")
    return ends

"""Progressive distillation: halve the number of DDIM steps, again and again (Salimans & Ho, arXiv 2202.00512)."""

import copy
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.components.branches import BranchedMethod
from lightning_modules.components.method import Method, check_nfe
from stillhouse.checkpoints import load_weights, read_card, save_weights
from stillhouse.checks import check_choice, check_counts
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.losses import noised
from stillhouse.diffusion.preconditioning import Epsilon
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.solvers import euler_step
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks.branching import plain_state, respread

# Weights of |x - D|^2 as functions of the SNR, 1 / sigma^2 (the paper's section 4).
WEIGHTINGS = {
    "truncated_snr": lambda snr: snr.clamp_min(1),
    "snr_plus_one": lambda snr: snr + 1,
    "snr": lambda snr: snr,
}
_ONE_TRAINING = (
    "{} was written when all rounds of progressive distillation were one training, and can't be resumed: choose another name=... "
    "to train again"
)


class ProgressiveDistillation(BranchedMethod):
    """Rounds that each teach a student to do in one DDIM step what its teacher does in `factor`; then it is the teacher.

    The round of N steps draws images x0, an index i uniform over the N upper levels of its grid, noise, x = x0 + sigma_i e,
    takes `factor` teacher steps from x at sigma_i to x'' at sigma'', and regresses the estimate for which one step lands there,

        (sigma_i x'' - sigma'' x) / (sigma_i - sigma''),

    the paper's inverted DDIM step divided by its signal scale; at sigma'' = 0 it is x'' itself, the paper's case i = 1.

    This is the last round, and those before it are its stages: trainings of their own, each with a new optimiser and a learning
    rate that falls from `lr` to zero. A round starts as its teacher, the student of the round before as it would be measured:
    the averaged one where the run has averages, else as trained. It is kept in the run's folder, as rounds/N.safetensors. The
    sequence of training samples goes on from round to round.

    Args:
        teacher: Of the first round.
        start_steps: Its steps, on its own schedule, of which every coarser grid takes every n-th level.
        end_steps: Of the last student.
        factor: By which each round divides the steps.
        long_rounds: Rounds to so many steps or fewer take twice as much of `kimg`, which is of all rounds, as others.
        weighting: One of WEIGHTINGS.
        clip: Whether samples are made of estimates clipped to [-1, 1], as released.
        common: Of all methods, and of branches.

    Raises:
        ValueError: For a value out of range, or steps that the divisions do not lead to.
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
        self.student = teacher.student(label_dropout=False).eval()  # no dropout, as released
        self.guide = teacher.replica()  # the round's teacher
        self.widen_student(factor)
        self.weighting, self.clip = weighting, clip
        self.grid = teacher.sigmas(start_steps)
        if len(self.grid) != start_steps + 1:
            raise ValueError(
                f"method.start_steps={start_steps}: the teacher's schedule has {len(self.grid) - 1} steps there"
            )
        self.rounds = halvings(start_steps, end_steps, factor)
        self.ends = shares(self.total_steps, [2 if steps <= long_rounds else 1 for steps in self.rounds])
        self._set_round(len(self.rounds) - 1)

    def _set_round(self, number: int) -> None:
        self.steps = self.rounds[number]  # of its student
        self.steps_before = self.ends[number - 1] if number else 0
        self.total_steps = self.ends[number] - self.steps_before

    @property
    def evaluations(self) -> dict[str, float]:
        # Of the first round alone the teacher is guided; of the others it is the student before.
        estimate = 1 if self.steps_before else self.teacher.evaluations_per_estimate
        return {"student": 1.0, "teacher": float(self.substeps * estimate)}

    def lr_scale(self) -> float:
        return super().lr_scale() * (1 - self.progress)

    def levels(self) -> Tensor:
        """The student's noise levels (N, factor + 1): row i has those of the teacher's steps inside its step i."""
        stride = (len(self.grid) - 1) // (self.steps * self.substeps)
        fine = self.grid[::stride]
        return fine.unfold(0, self.substeps + 1, self.substeps)

    # -- training of a round ---------------------------------------------------------------------------------------

    def frozen_networks(self) -> list[Teacher]:
        """The round's teacher, which in the first round is a copy of the original one."""
        return [self.guide]

    def on_fit_start(self) -> None:
        super().on_fit_start()
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
        return loss

    @torch.no_grad()
    def targets(self, x: Tensor, sigmas: Tensor, labels: Tensor | None) -> Tensor:
        """What each branch should estimate, (B, K, C, H, W), of x (B, C, H, W) at the first of sigmas (B, factor + 1)."""
        levels = sigmas[:, :, None, None, None].unbind(1)
        state, targets = x, []
        for step in range(1, self.substeps + 1):
            estimate = self.guide.denoiser(state, sigmas[:, step - 1], labels)
            state = euler_step(state, estimate, levels[step - 1], levels[step])
            if step % self.stride == 0:
                targets.append((levels[0] * state - levels[step] * x) / (levels[0] - levels[step]))
        return torch.stack(targets, 1)

    # -- rounds ----------------------------------------------------------------------------------------------------

    def stages(self) -> dict[str, Method]:
        """The rounds before the last one, which share their networks."""
        rounds = {}
        for number, steps in enumerate(self.rounds[:-1]):
            stage = copy.copy(self)
            stage.means = {}
            stage._set_round(number)
            rounds[f"rounds/{steps}"] = stage
        return rounds

    def preparation(self, folder: Path) -> dict[str, float] | None:
        cards = [read_card(kept_student(folder, steps)) for steps in self.rounds[:-1]]
        costs = [card["cost"] for card in cards if "cost" in card]  # of earlier versions none
        return {key: sum(cost[key] for cost in costs) for key in costs[0]} if costs else None

    def stored_bytes(self, network: int) -> dict[str, int]:
        return {f"students of {len(self.rounds) - 1} rounds before the last": network * (len(self.rounds) - 1)}

    @property
    def _run_folder(self) -> Path:
        folder = Path(self.trainer.default_root_dir)
        return folder if self.steps == self.rounds[-1] else folder.parents[1]

    @property
    def _done(self) -> bool:
        """Whether the student of this round, not the last one, is there already."""
        return self.steps != self.rounds[-1] and kept_student(self._run_folder, self.steps).exists()

    def setup(self, stage: str) -> None:
        """Starts a round as its teacher, before a checkpoint is restored, which then has the last word."""
        super().setup(stage)
        if stage != "fit" or self._done:
            return
        if self.steps != self.rounds[-1]:
            if (checkpoint := self._run_folder / "checkpoints" / "last.ckpt").exists():
                raise ValueError(_ONE_TRAINING.format(checkpoint))
            self.training_seconds()  # a missing clock shows now, not at the end of the round
        self.guide.set_guidance(not self.steps_before)  # what is distilled of it is guided already
        taught = self.teacher.denoiser.network.state_dict()
        if self.steps_before:
            previous = self.rounds[self.rounds.index(self.steps) - 1]
            load_weights(kept_student(self._run_folder, previous), self.guide.denoiser.network)
            taught = self.guide.denoiser.network.state_dict()
        else:
            self.guide.denoiser.network.load_state_dict(taught)
        with torch.no_grad():
            for name, value in plain_state(self.student.network).items():
                value.copy_(taught[name])
            respread(self.student.network)

    def on_train_start(self) -> None:
        if self.trainer.strategy.broadcast(self._done):
            self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        """Keeps a round's student, also where all that a kill left to do was to keep it."""
        if self.steps == self.rounds[-1] or self.trainer.global_step < self.total_steps:
            return
        averages = next(
            (callback for callback in self.trainer.callbacks if hasattr(callback, "applied")), None
        )  # callbacks.EMA
        with averages.applied(self) if averages else nullcontext():
            if self.trainer.is_global_zero:
                seconds = self.training_seconds()
                images = self.total_steps * self.batch_size
                card = {
                    "method": self.name,
                    "steps": self.steps,
                    "round": self.rounds.index(self.steps) + 1,
                    "weights": averages.names[0] if averages else "raw",
                    "seed": self.seed,
                    "teacher": self.teacher.name,
                    **({"guidance": self.teacher.guidance_name} if self.teacher.guided else {}),
                    "licence": self.licence,
                    "cost": {"steps": self.total_steps, "images": images, "seconds": seconds},
                }
                save_weights(kept_student(self._run_folder, self.steps), self.exported(), card, replace=True)
        self.trainer.strategy.barrier()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "round" in checkpoint and checkpoint["global_step"] < self.ends[-1]:
            raise ValueError(_ONE_TRAINING.format("this checkpoint"))
        weights = checkpoint["state_dict"]  # which in earlier versions held the round's teacher, too
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if not name.startswith("guide.")}
        super().on_load_checkpoint(checkpoint)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sampling(self, nfe: int | None = None) -> Sampling:
        check_nfe(nfe, *dict.fromkeys((self.steps, self.chosen_nfe or self.steps)))  # of the student in place
        sigmas = self.grid[:: (len(self.grid) - 1) // (nfe or self.steps)].tolist()
        return Sampling(sigmas, self.student.preconditioning.prior_std(self.grid[0]).item(), clip=self.clip)

    def sampled_student(self) -> Denoiser:
        """The student of the chosen round: an earlier one's is put in the place of the last round's teacher."""
        return self.student if self.chosen_nfe in (None, self.steps) else self.guide.to(self.device).unguided

    def exported(self) -> dict[str, Tensor]:
        return plain_state(self.sampled_student().network)

    def choose_steps(self, nfe: int, folder: Path) -> str | None:
        kept = kept_student(folder, nfe)
        if nfe == self.steps:
            self.chosen_nfe = nfe
            return None
        if nfe not in self.rounds or not kept.exists():
            there = [n for n in self.rounds if n == self.steps or kept_student(folder, n).exists()]
            raise ValueError(f"steps={nfe}: {folder} has students of {', '.join(map(str, there))} steps")
        load_weights(kept.resolve(), self.guide.denoiser.network)
        self.chosen_nfe = nfe
        return read_card(kept).get("weights", "raw")


def kept_student(folder: Path, steps: int) -> Path:
    """Where the student of a round is kept in a run's folder."""
    return folder / "rounds" / f"{steps}.safetensors"


def halvings(start: int, end: int, factor: int) -> list[int]:
    """The students' numbers of steps, start / factor down to end.

    Raises:
        ValueError: Where division does not lead there.
    """
    counts = []
    steps = start
    while steps > end and steps % factor == 0:
        steps //= factor
        counts.append(steps)
    if not counts or steps != end:
        raise ValueError(
            f"method.start_steps={start} divided by method.factor={factor} again and again does not come to "
            f"method.end_steps={end}: make it {end} times a power of {factor}"
        )
    return counts


def shares(total: int, parts: list[int]) -> list[int]:
    """The training steps at which consecutive rounds end that share `total` of them as `parts` say.

    Raises:
        ValueError: Where a round would have none.
    """
    ends = [total * sum(parts[: i + 1]) // sum(parts) for i in range(len(parts))]
    if ends[0] == 0 or any(a == b for a, b in pairwise(ends)):
        raise ValueError(f"method.kimg gives {total} training steps, too few for {len(parts)} rounds; raise it")
    return ends

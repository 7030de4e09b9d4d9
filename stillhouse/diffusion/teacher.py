"""Teachers: frozen denoisers that know how they are sampled."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.checkpoints.published import PublishedCheckpoint
from stillhouse.checkpoints.weights import hash_form, hash_state, load_weights
from stillhouse.checks import check_memory
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.guidance import GuidedDenoiser, check_guidance
from stillhouse.diffusion.preconditioning import Preconditioning
from stillhouse.diffusion.sampling import Sampling
from stillhouse.diffusion.solvers import SOLVERS, check_solver, evaluations
from stillhouse.files import check_folder_name
from stillhouse.networks.network import autocast_weights

# Of a noise level: float64 in several tensors of the schedule, and its text, by which samples are known.
_LEVEL_BYTES = 300


class Teacher:
    """A denoiser with its weights, schedule, solver, labels and licence.

    It is deliberately no nn.Module and copies to itself: held by a LightningModule it stays out of checkpoints,
    optimisers, averages and DDP buckets.

    Args:
        name: of the teacher, in file names and tables.
        network: see `stillhouse.networks`.
        preconditioning: the coefficients by which the network becomes a denoiser.
        schedule: from a number of steps to noise levels, see `stillhouse.diffusion.schedules`.
        weights: a file, see `load_weights`; None leaves the network at its random initialisation, as training one needs.
        sha256: of that file.
        source: the published file that missing weights are made of, here and once.
        solver: a name of `SOLVERS`.
        solver_options: its keyword arguments.
        steps: solver steps of a sample.
        conditional: whether labels are used, where the network has classes.
        licence: of the weights.
        guidance: the weight w of `GuidedDenoiser`; None and 1: none.
        guidance_interval: the noise levels, lowest and highest, between which it is guided; None: all.
        guide: the teacher whose estimates it is guided away from; None: its own, without labels.

    Attributes:
        denoiser: what is learned from and sampled, guided where it is guided: a `Denoiser`, or a `GuidedDenoiser`, which has its
            network and preconditioning as well.

    Raises:
        ValueError: for an unknown solver, options that it lacks or cannot take, an impossible number of steps, and a guidance
            that it can't have.
        FileNotFoundError: for missing weights; other errors of weights and of the source as there.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        preconditioning: Preconditioning,
        schedule: Callable[[int], Tensor],
        *,
        weights: str | None = None,
        sha256: str | None = None,
        source: PublishedCheckpoint | None = None,
        solver: str = "heun",
        solver_options: Mapping[str, bool | float | None] | None = None,
        steps: int = 18,
        conditional: bool = True,
        licence: str = "unknown",
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: "Teacher | None" = None,
    ):
        check_guidance(guidance, guidance_interval, guide is not None)
        check_folder_name("teacher.name", name, "data")
        options = dict(solver_options or {})
        check_solver("teacher", solver, options)
        self.name = name
        self.weights = weights
        self.licence = licence
        self.solver = solver
        self.solver_options = options
        self.schedule = schedule
        self.steps = steps
        self.conditional = conditional
        if weights is not None:
            if source is not None:
                source.provide(weights, network, preconditioning, licence)
            load_weights(weights, network, sha256)
        self.denoiser = Denoiser(network, preconditioning).eval().requires_grad_(False)
        self.guide: Teacher | None = None
        if guidance not in (None, 1):
            self._set_guidance(guidance, guidance_interval, guide)
        self.sigmas()  # an impossible step count is refused now, not after an hour
        self._hash: str | None = None
        self._rounded_to: torch.dtype | None = None
        self._exact: list[tuple[nn.Parameter, Tensor]] = []  # weights that are rounded now, and their values

    def __deepcopy__(self, memo: dict) -> "Teacher":
        return self

    def _set_guidance(self, weight: float, interval: Sequence[float] | None, guide: "Teacher | None") -> None:
        option = f"teacher.guidance={weight:g}"
        if self.is_consistency_model:
            raise ValueError(
                f"{option}: teacher {self.name} is a consistency model, whose estimates are samples; guide the diffusion model "
                "that it is distilled from"
            )
        labels = guide is not None and guide.num_classes > 0
        if guide is None:
            if not self.num_classes or not can_hide_labels(self.denoiser.network):
                reason = "was trained to see all labels (label_dropout)" if self.num_classes else "takes no labels"
                raise ValueError(
                    f"{option} guides by a teacher's own estimates without labels, and {self.name} {reason}: name a second "
                    "network to guide it by, teacher.guide=NAME (conf/teacher, or a run's folder)"
                )
        else:
            for key in ("resolution", "channels", "num_classes"):
                theirs, ours = getattr(guide, key), getattr(self, key)
                if theirs != ours and (key != "num_classes" or theirs):
                    raise ValueError(
                        f"teacher.guide={guide.name} has {key}={theirs}, teacher {self.name} {ours}: choose another guide"
                    )
        self.guide = guide
        second = None if guide is None else guide.unguided
        self.denoiser = GuidedDenoiser(self.denoiser, weight, interval, second, labels).eval()

    @property
    def resolution(self) -> int:
        return self.denoiser.network.resolution

    @property
    def channels(self) -> int:
        return self.denoiser.network.in_channels

    @property
    def num_classes(self) -> int:
        """Classes of its labels, 0 where they are absent or ignored."""
        return self.denoiser.network.num_classes if self.conditional else 0

    @property
    def solver_name(self) -> str:
        """The solver with its options, and the guidance, as named in stores and fingerprints."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.solver_options.items()))
        name = f"{self.solver}({options})" if options else self.solver
        return f"{name}, {self.guidance_name}" if self.guided else name

    @property
    def guided(self) -> bool:
        """Whether its estimates are guided."""
        return isinstance(self.denoiser, GuidedDenoiser)

    @property
    def guidance_name(self) -> str | None:
        """The guidance in words, such as "guidance 1.5 on (0.3, 5] by NAME"; None without."""
        if not self.guided:
            return None
        interval = self.denoiser.interval
        levels = "" if interval is None else f" on ({interval[0]:g}, {interval[1]:g}]"
        return f"guidance {self.denoiser.weight:g}{levels}" + (f" by {self.guide.name}" if self.guide else "")

    @property
    def unguided(self) -> Denoiser:
        """Its denoiser without guidance, with the same weights."""
        return self.denoiser.unguided if self.guided else self.denoiser

    @property
    def denoisers(self) -> list[Denoiser]:
        """What an estimate evaluates: its denoiser, and the guide where that is another network."""
        return [self.unguided, *([self.denoiser.guide] if self.guided and self.denoiser.guide else [])]

    @property
    def evaluations_per_estimate(self) -> int:
        """Network evaluations of one estimate in training: 2 where it is guided, else 1."""
        return 2 if self.guided else 1

    @property
    def level_range(self) -> tuple[float, float]:
        """The least noise level above zero and the greatest one of its samples."""
        sigmas = self.sigmas(max(self.steps, 2))
        return sigmas[-2].item(), sigmas[0].item()

    @property
    def is_consistency_model(self) -> bool:
        """Whether it is sampled as one, by estimates and noise between them: its estimates are no denoiser's."""
        return self.solver == "renoising"

    @property
    def hash(self) -> str:
        """SHA-256 over weights, preconditioning and guidance, 64 hex digits."""
        if self._hash is None:
            preconditioning = self.denoiser.preconditioning
            settings = {
                k: v for k, v in vars(preconditioning).items() if isinstance(v, int | float) and k != "training"
            }
            with self.exact_weights():
                parts = [hash_state(self.denoiser.network), type(preconditioning).__name__, settings]
                if self.guided:
                    parts += [self.denoiser.description(), None if self.guide is None else self.guide.hash]
            text = json.dumps(parts, sort_keys=True)
            self._hash = hashlib.sha256(text.encode()).hexdigest()
        return self._hash

    @property
    def form(self) -> str:
        """SHA-256 over what its denoiser is beside the weights (`hash_form`), 64 hex digits.

        It does not enter `hash`, by which stored trajectories of earlier versions are found.
        """
        return hash_form(self.denoiser)

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the denoiser, in place. Returns the teacher."""
        with self.exact_weights():
            self.denoiser.to(device)
        return self

    def round_weights(self, dtype: torch.dtype | None) -> None:
        """Keep the weights that autocast would round to `dtype` at each evaluation in it, from now on; None: exact ones again.

        Evaluations under autocast give the same bits, without reading and rounding all weights each time. Others are
        possible within `exact_weights`.
        """
        for parameter, exact in self._exact:
            parameter.data = exact
        self._rounded_to, self._exact = dtype, []
        if dtype is not None:
            self._exact = [(p, p.data) for part in self.denoisers for p in autocast_weights(part.network)]
            with torch.inference_mode(False):
                for parameter, exact in self._exact:
                    parameter.data = exact.to(dtype)

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Give the weights back as they are within the block, which may replace them."""
        dtype = self._rounded_to
        if dtype is None:
            yield
            return
        self.round_weights(None)
        try:
            yield
        finally:
            self.round_weights(dtype)

    def student(self, label_dropout: bool = True) -> Denoiser:
        """Make a trainable copy of the denoiser, without guidance.

        Args:
            label_dropout: False for a copy from which training never hides a label, as one needs that learns from the
                teacher's samples.
        """
        denoiser = copy.deepcopy(self.unguided).requires_grad_(True)
        for module in () if label_dropout else denoiser.modules():
            if hasattr(module, "label_dropout"):
                module.label_dropout = 0.0
        return denoiser

    def replica(self) -> "Teacher":
        """Make a teacher with a denoiser of its own, for weights that are replaced in training."""
        replica = copy.copy(self)
        with self.exact_weights():
            replica.denoiser = copy.deepcopy(self.denoiser)
        replica._rounded_to, replica._exact, replica._hash = None, [], None
        return replica

    def sampled_by(
        self,
        solver: str,
        solver_options: Mapping[str, bool | float | None] | None,
        schedule: Callable[[int], Tensor],
        steps: int,
    ) -> "Teacher":
        """Make a teacher of the same denoiser that is sampled in another way; arguments as of the class.

        Raises:
            ValueError: As of the class.
        """
        other = copy.copy(self)
        options = dict(solver_options or {})
        check_solver("method", solver, options)
        other.solver, other.solver_options, other.schedule, other.steps = solver, options, schedule, steps
        other.sigmas()
        return other

    def set_guidance(self, active: bool) -> None:
        """Guide from now on, or not, where it is guided: as weights change that are no teacher's."""
        if self.guided:
            self.denoiser.set_active(active)

    def sigmas(self, steps: int | None = None, through: Sequence[float] = ()) -> Tensor:
        """Make the sampling noise levels.

        Args:
            steps: solver steps, by default the teacher's.
            through: levels that must be among them. Each replaces the one nearest to it in ln(sigma), so the number of steps
                stays.

        Returns:
            float64 on the CPU, descending, the last one zero.

        Raises:
            ValueError: where two of `through` would replace the same level, the highest, or the zero.
        """
        steps = self.steps if steps is None else steps
        if type(steps) is int:
            check_memory(
                _LEVEL_BYTES * steps, f"{steps} solver steps of teacher {self.name} (lower them): their noise levels"
            )
        sigmas = self.schedule(steps)
        places = [(sigmas[:-1].log() - math.log(level)).abs().argmin().item() for level in through]
        if len({0, *places}) <= len(places):
            raise ValueError(
                f"teacher {self.name} has too few steps ({len(sigmas) - 1}) to pass through the noise levels "
                f"{', '.join(f'{level:g}' for level in through)}; give it more (teacher.steps)"
            )
        sigmas[places] = torch.tensor(through, dtype=sigmas.dtype)
        return sigmas

    def nfe(self, steps: int | None = None) -> int:
        """Count the network evaluations of a sample of so many solver steps, by default the teacher's; a guide's count too."""
        sigmas = self.sigmas(steps)
        if not self.guided:
            return evaluations(self.solver, len(sigmas) - 1)
        count = 0

        def estimate(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            nonlocal count
            count += 2 if self.denoiser.guides_at(sigma.item()) else 1
            return x

        for _ in SOLVERS[self.solver].solve(estimate, torch.zeros(1, 1, 1, 1), sigmas, None, **self.solver_options):
            pass
        return count

    def trajectory(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        steps: int | None = None,
        denoiser: Any = None,
        through: Sequence[float] = (),
    ) -> Iterator[Tensor]:
        """Solve the probability-flow ODE from noise.

        Args:
            noise: unit normal (B, C, H, W).
            labels: classes (B,), int64, or None.
            steps: solver steps, by default the teacher's.
            denoiser: another denoiser, such as a network in training, to sample by the teacher's schedule and solver.
            through: noise levels that the schedule is bent to, as of `sigmas`.

        Yields:
            The state after each solver step, float64 (B, C, H, W).
        """
        denoiser = denoiser or self.denoiser
        sigmas = self.sigmas(steps, through)
        x = noise.double() * denoiser.preconditioning.prior_std(sigmas[0]).item()
        solve = SOLVERS[self.solver].solve
        states = solve(denoiser, x, sigmas, labels if self.conditional else None, **self.solver_options)
        while True:
            # Around each step alone: a generator must not leak the mode to its consumer.
            with torch.no_grad(), self.exact_weights():
                state = next(states, None)
            if state is None:
                return
            yield state

    def sampling(self, steps: int | None = None) -> Sampling:
        """Describe its sampling as plain data, in so many solver steps, by default the teacher's."""
        sigmas = self.sigmas(steps)
        scale = self.denoiser.preconditioning.prior_std(sigmas[0]).item()
        return Sampling(sigmas.tolist(), scale, self.solver, dict(self.solver_options))

    def sample(
        self, noise: Tensor, labels: Tensor | None = None, steps: int | None = None, denoiser: Any = None
    ) -> Tensor:
        """Sample images, the end points of `trajectory`, float32 (B, C, H, W) in about [-1, 1], not clipped."""
        state = noise
        for state in self.trajectory(noise, labels, steps, denoiser):  # noqa: B007
            pass
        return state.float()


def can_hide_labels(network: nn.Module) -> bool:
    """Whether labels were hidden from a network in training, so that it knows how to do without them."""
    return any(getattr(module, "label_dropout", 0) for module in network.modules())

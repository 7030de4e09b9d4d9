"""Exponential moving averages (EMA) of the student's weights, which are evaluated in place of the trained weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from stillhouse.checkpoints.posthoc_average import power_of_width, relative_width
from stillhouse.checkpoints.weights import check_numbers, save_weights

RAW = "raw"
SNAPSHOTS = "snapshots"  # the folder, in a run's, of averages that are kept along the way
_PREFIX = "student."
_RULES = "EMA: an average is either {{decay}}, {{halflife_kimg, rampup_ratio}}, {{gamma}} or {{sigma_rel}}, got {}"


@dataclass(frozen=True)
class Average:
    """One averaging rule: a constant `decay` per update, a half-life in thousands of images with a ramp-up, or a power rule.

    The half-life is at most `rampup_ratio` times the images seen so far (None: no such limit), as in EDM's training loop, so
    that the initial weights are forgotten early.

    The power rule has beta = (1 - 1/n)^(gamma + 1) in the n-th update (EDM2, arXiv 2312.02696): the weights at a share t of the
    updates so far count as t^gamma, however many there are, and the initial ones not at all. It is given by `gamma` or by
    `sigma_rel`, the standard deviation of that profile.

    Raises:
        ValueError: for not exactly one of the four, or values out of range.
    """

    decay: float | None = None
    halflife_kimg: float | None = None
    rampup_ratio: float | None = 0.05
    gamma: float | None = None
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        if sum(rule is not None for rule in (self.decay, self.halflife_kimg, self.gamma, self.sigma_rel)) != 1:
            raise ValueError(_RULES.format(self))
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"EMA: decay must lie in [0, 1), got {self.decay}")
        if self.halflife_kimg is not None and not self.halflife_kimg > 0:
            raise ValueError(f"EMA: halflife_kimg must be positive, got {self.halflife_kimg}")
        if self.rampup_ratio is not None and not self.rampup_ratio > 0:
            raise ValueError(f"EMA: rampup_ratio must be positive or null, got {self.rampup_ratio}")
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ValueError(f"EMA: gamma must not be negative, got {self.gamma}")
        if self.sigma_rel is not None and not 0 < self.sigma_rel <= relative_width(0):
            raise ValueError(f"EMA: sigma_rel must lie in (0, {relative_width(0):.4f}], got {self.sigma_rel}")

    @property
    def name(self) -> str:
        """Such as ema_0.999, ema_500kimg, ema_gamma16.97 or ema_sigma_rel0.05."""
        if self.halflife_kimg is not None:
            return f"ema_{self.halflife_kimg:g}kimg"
        if self.gamma is not None:
            return f"ema_gamma{self.gamma:g}"
        return f"ema_{self.decay}" if self.decay is not None else f"ema_sigma_rel{self.sigma_rel:g}"

    @property
    def exponent(self) -> float | None:
        """The power rule's gamma; None for another rule."""
        return self.gamma if self.sigma_rel is None else power_of_width(self.sigma_rel)

    def beta(self, nimg: int, batch_size: int) -> float:
        """The weight of the old average in an update, in [0, 1).

        Args:
            nimg: images seen before the batch.
            batch_size: images of the batch.
        """
        if self.decay is not None:
            return self.decay
        if self.halflife_kimg is None:
            return (nimg / (nimg + batch_size)) ** (self.exponent + 1)
        halflife_nimg = 1000 * self.halflife_kimg
        if self.rampup_ratio is not None:
            halflife_nimg = min(halflife_nimg, nimg * self.rampup_ratio)
        return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))


class EMA(pl.Callback):
    """Keeps averages of a method's student, in float32, each updated once per update of the student.

    Training steps that update other networks alone (`Method.student_updated` is false) do not count, so that decays and
    half-lives mean updates and images of the student. An average is taken after the method's `after_update`. Buffers are not
    averaged: with an average the student uses its own. Validation, test and predict see the first average.
    """

    def __init__(
        self,
        averages: Mapping[str, float] | Sequence[Mapping[str, float]] = ({"decay": 0.999},),
        snapshots_kimg: float | None = None,
    ) -> None:
        """Choose the rules of averaging.

        Args:
            averages: one rule or several, each a mapping with the fields of `Average`, such as {"decay": 0.999}.
            snapshots_kimg: after how many thousands of images the averages are kept, each time, in the run's folder, so that
                others can be made of them (`stillhouse.checkpoints.posthoc_average`); None: never.

        Raises:
            ValueError: for no rule, the same rule twice, or what is no rule; for snapshots of averages by other than power rules.
        """
        specs = [averages] if isinstance(averages, Mapping) else list(averages)
        fields = set(Average.__dataclass_fields__)
        for spec in specs:
            rampup = isinstance(spec, Mapping) and "rampup_ratio" in spec and "halflife_kimg" not in spec
            if not isinstance(spec, Mapping) or not set(spec) <= fields or rampup:
                raise ValueError(_RULES.format(spec))
        self.averages = {rule.name: rule for rule in (Average(**spec) for spec in specs)}
        if not specs or len(self.averages) < len(specs):
            raise ValueError(f"EMA: averages must be one or several different rules, got {specs}")
        if snapshots_kimg is not None and not snapshots_kimg > 0:
            raise ValueError(f"EMA: snapshots_kimg must be positive or null, got {snapshots_kimg!r}")
        if snapshots_kimg is not None and any(rule.exponent is None for rule in self.averages.values()):
            raise ValueError(
                "EMA: snapshots_kimg is for averages by power rules, of which others can be made: say "
                "'callbacks.ema.averages=[{sigma_rel: 0.05}, {sigma_rel: 0.1}]', or callbacks.ema.snapshots_kimg=null"
            )
        self.snapshots_kimg = snapshots_kimg
        self.updates = 0
        self._values: dict[str, dict[str, Tensor]] = {}
        self._step = 0
        self._active = RAW
        self._raw: list[Tensor] = []
        self._live: list[nn.Parameter] = []

    @property
    def names(self) -> list[str]:
        """Names of the averages, such as ema_0.999 and ema_500kimg; the first is the one that is evaluated."""
        return list(self.averages)

    @contextmanager
    def applied(self, pl_module: pl.LightningModule, name: str | None = None) -> Iterator[None]:
        """Give the student other weights inside the block, and its own back afterwards, even on an exception.

        Before training has begun the averages are the weights themselves.

        Args:
            pl_module: the method whose student it is.
            name: of an average, or "raw" for the trained weights; None: the first average.

        Raises:
            ValueError: for a name that there is not.
        """
        before = self._active
        self._put(pl_module, name or self.names[0])
        try:
            yield
        finally:
            self._put(pl_module, before)

    def _put(self, pl_module: pl.LightningModule, name: str) -> None:
        if name != RAW and name not in self.averages:
            raise ValueError(f"EMA: no average is called {name!r}; there are {[*self.names, RAW]}")
        if name == self._active or not self._values:
            return
        # Lightning validates in inference mode, whose tensors could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            self._align(pl_module.student)
            parameters = list(pl_module.student.parameters())
            if self._active == RAW:
                self._raw = [p.data for p in parameters]
            values = self._raw if name == RAW else self._values[name].values()
            for p, value in zip(
                parameters, [v.to(p.dtype) for v, p in zip(values, parameters, strict=True)], strict=True
            ):
                p.data = value
            self._active = name
            if name == RAW:
                self._raw = []
            # Inside an autocast region the low-precision copies of the other weights would still be in use.
            torch.clear_autocast_cache()

    def _align(self, student: nn.Module) -> None:
        """Bring restored averages to the device and into the memory format of the student's parameters."""
        parameters = dict(student.named_parameters())
        for name, values in self._values.items():
            if list(values) != list(parameters):
                odd = sorted(values.keys() ^ parameters.keys())
                raise ValueError(f"EMA: {name} in the checkpoint averages another student: only one of them has {odd}")
            check_numbers(f"EMA: {name} in the checkpoint", values, student)
            pairs = zip(values.values(), parameters.values(), strict=True)
            if any(v.device != p.device or v.stride() != p.stride() for v, p in pairs):
                self._values[name] = {
                    key: torch.empty_like(p, dtype=torch.float32).copy_(values[key]) for key, p in parameters.items()
                }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if not self._values:
            for name in self.names:
                self._values[name] = {
                    key: p.detach().to(torch.float32, copy=True) for key, p in pl_module.student.named_parameters()
                }
        self._align(pl_module.student)
        self._live = list(pl_module.student.parameters())

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if not stepped or not pl_module.student_updated:
            return
        live = [p.float() for p in self._live]
        nimg, batch_size = self.updates * pl_module.batch_size, pl_module.batch_size
        for name, rule in self.averages.items():
            torch._foreach_lerp_(list(self._values[name].values()), live, 1 - rule.beta(nimg, batch_size))
        self.updates += 1
        if self.snapshots_kimg is not None:
            every = 1000 * self.snapshots_kimg
            if nimg // every != (nimg + batch_size) // every:
                self._keep(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.snapshots_kimg is not None and self.updates:
            self._keep(trainer)

    def _keep(self, trainer: pl.Trainer) -> None:
        """Keep the averages as they are now, in the first process."""
        for name, rule in self.averages.items() if trainer.is_global_zero else ():
            file = Path(trainer.default_root_dir) / SNAPSHOTS / f"{name}-{self.updates:08d}.safetensors"
            card = {"average": name, "updates": self.updates, "gamma": rule.exponent}
            save_weights(file, self._values[name], card, replace=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put(pl_module, self.names[0])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put(pl_module, RAW)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put(pl_module, RAW)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = list(state_dict["averages"])
        if stored and stored != self.names:
            raise ValueError(
                f"EMA: the checkpoint holds {stored}, the config asks for {self.names}: "
                "keep callbacks.ema.averages as the run began, or start a run under a new name"
            )
        self.updates = state_dict["updates"]
        self._values = dict(state_dict["averages"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._active != RAW:
            raise RuntimeError(
                f"EMA: the student holds the average {self._active} now; a checkpoint would lose the trained weights. "
                "Save outside of EMA.applied() and of validation"
            )


def student_weights(
    trainer: pl.Trainer, user: pl.Callback, names: Sequence[str] | None
) -> dict[str, Callable[[pl.LightningModule], AbstractContextManager[None]]]:
    """For each name of weights, a context manager that gives them to the student while the callback `user` evaluates it.

    Args:
        trainer: whose EMA callback has the averages.
        user: the callback that asks.
        names: of averages, or "raw" for the trained weights; None: the first average, or the trained weights without EMA.

    Raises:
        ValueError: for unknown names, and where EMA comes after `user`: its averages would lack the step just made.
    """
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
    if ema is not None and trainer.callbacks.index(ema) > trainer.callbacks.index(user):
        raise ValueError(f"{type(user).__name__} must come after EMA in callbacks")
    known = [*(ema.names if ema else ()), RAW]
    chosen = known[:1] if names is None else list(names)
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"{type(user).__name__}: ema_names must be some of {known}, got {chosen}")
    if ema is None:
        return {RAW: nullcontext}
    return {name: partial(ema.applied, name=name) for name in chosen}


def student_state(checkpoint: dict[str, Any], name: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """The student's weights in a loaded checkpoint.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        name: of an average, or "raw" for the trained weights; None: the first average, or the trained weights without EMA.

    Returns:
        The name of the weights, and their state dict; floats of an average are float32.

    Raises:
        ValueError: for a name that the checkpoint lacks.
    """
    raw = {k.removeprefix(_PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(_PREFIX)}
    averages = checkpoint.get("callbacks", {}).get(EMA.__qualname__, {}).get("averages", {})
    name = name or next(iter(averages), RAW)
    if name == RAW:
        return name, raw
    if name not in averages:
        raise ValueError(f"the checkpoint has no weights called {name!r}; it has {[*averages, RAW]}")
    return name, raw | averages[name]

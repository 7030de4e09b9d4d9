"""Whether every method trains, samples, saves and resumes on the device, in every precision and compiled: tiny networks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.gpu.cases import ALL_METHODS, TINY
from benchmarks.gpu.stages import Entry, Setting, Stage
from benchmarks.gpu.worker import PASSED, REFUSED, Row
from benchmarks.methods import CYCLE, config, prepared
from launch.run.build import build_seeded
from launch.run.folder import RunFolder
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise

_STEPS = 3 * CYCLE  # then, resumed, one cycle more
_SAMPLES = 3
_COMPILED = "bf16-mixed, compiled"


def entries(setting: Setting) -> Iterator[Entry]:
    """Every method in bfloat16 first, which most will use, then in float32, and one compiled; the other compiled ones last."""
    methods = [name for name in ALL_METHODS if name != "degradation"]  # which is not sampled, and is a part of disback
    if setting.dry:
        yield from (_entry(method, "bf16-mixed") for method in methods)
        yield _entry("rectified_flow", "bf16-mixed", _COMPILED, "aot_eager")  # a CPU takes inductor half a minute
        return
    yield from (_entry(method, precision) for precision in ("bf16-mixed", "32-true") for method in methods)
    chosen = dict.fromkeys(("pretrain", "diff_instruct", "sfd", *methods))
    first, *others = (_entry(method, "bf16-mixed", _COMPILED, True) for method in chosen)
    yield first
    yield from (_entry(method, "16-mixed") for method in methods)
    yield from others
    yield from (_entry(method, "bf16-mixed", "bf16-mixed, CUDA graphs", "reduce-overhead") for method in chosen)


def _entry(method: str, precision: str, form: str | None = None, compile: bool | str = False) -> Entry:
    form = form or precision
    options = {"method": method, "form": form, "precision": precision, "compile": compile}
    return Entry(f"{method}, {form}", options, *((120, 10) if compile else (30, 3)))


class _ThirdCycle(pl.Callback):
    """Samples and saves after `_STEPS` steps, and ends the training there, as a kill would."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.samples: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == _STEPS:
            seeds = torch.arange(_SAMPLES, device=pl_module.device)
            noise = sample_noise(seeds, pl_module.image_shape)
            self.samples = pl_module.sample(noise, sample_labels(seeds, pl_module.student.network.num_classes))
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True


def measure(setting: Setting, options: dict[str, Any], seconds: float) -> Row:
    """Train a method for three cycles of updates, sample, save, and go on from the checkpoint for another.

    Raises:
        RuntimeError: Where samples or weights are not finite, or the training does not go on where it was.
    """
    name, precision = options["method"], options["precision"]
    with TemporaryDirectory(prefix="stillhouse-benchmark-") as folder:
        cfg = config(
            TINY,
            folder,
            *ALL_METHODS[name],
            f"trainer.precision={precision}",
            f"trainer.accelerator={setting.accelerator}",
            f"trainer.compile={str(options['compile']).lower()}",
            "trainer.log_every_n_steps=1",
            f"trainer.validate_every_n_steps={CYCLE}",
        )
        if precision == "16-mixed" and (conflict := build_seeded(cfg.method, cfg.seed).loss_scale_conflict()):
            return {"status": REFUSED, "message": conflict}
        checkpoint = RunFolder(cfg.folder).last
        method, data, trainer = prepared(cfg, name, _STEPS + CYCLE)
        third = _ThirdCycle(checkpoint)
        trainer.callbacks.append(third)
        trainer.fit(method, data)
        if trainer.global_step != _STEPS or third.samples is None:
            raise RuntimeError(f"the training ended after {trainer.global_step} steps, not {_STEPS}")
        _check_finite("samples", [third.samples])
        method, data, trainer = prepared(cfg, name, _STEPS + CYCLE)
        trainer.fit(method, data, ckpt_path=checkpoint)
        if trainer.global_step != _STEPS + CYCLE:
            raise RuntimeError(f"the resumed training ended after {trainer.global_step} steps, not {_STEPS + CYCLE}")
        _check_finite("weights", [p for network in method.trained_networks().values() for p in network.parameters()])
    return {"steps": _STEPS, "resumed_steps": CYCLE}


def _check_finite(what: str, tensors: Sequence[torch.Tensor]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise RuntimeError(f"the {what} are not finite")


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each method, a column for each form."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    outcomes = {(row["method"], row["form"]): row["status"] for row in rows}
    lines = [f"| method | {' | '.join(forms)} |", f"|---|{'---|' * len(forms)}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [outcomes.get((method, form), "") for form in forms]
        lines.append(f"| {method} | {' | '.join(c if c == PASSED else c.upper() for c in cells)} |")
    return lines


SMOKE = Stage("smoke", "every method trains, samples, saves and resumes", entries, measure, table)

"""trainer.precision: what the networks compute in while they train. All else is in float32 or better, whatever it says.

32-true: float32, also in matrix products and convolutions on a GPU. tf32: float32 numbers, whose products and convolutions
a GPU rounds to TF32 (10 bits of mantissa) in training steps. bf16-mixed, 16-mixed: the networks run under autocast in training
steps, 16-mixed with a scaled loss.

In float32 (or float64) under every one of them:
- trained weights, gradients, the optimiser's moments and the averages (`callbacks/ema.py`);
- noise levels, preconditioning and the combination of a network's output with its input (`diffusion/denoiser.py`), and with
  them all estimates, their differences, score gradients and solvers' states;
- losses (`stillhouse/diffusion/losses.py`), and the embedding of noise levels in the networks;
- everything outside of a training step: stored teacher samples, held-out losses, samples, feature extraction and metrics.
  So a metric does not depend on this option but by what was learned under it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision, Precision

from lightning_modules import Method
from stillhouse.checks import check_choice
from stillhouse.diffusion.teacher import Teacher

PRECISIONS = ("32-true", "tf32", "bf16-mixed", "16-mixed")
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_AMPERE = (8, 0)  # the first GPUs that have TF32 and bfloat16


class TrainingAutocast(MixedPrecision):
    """Mixed precision of training steps alone: validation, and with it what checkpoints are chosen by, is in float32."""

    @contextmanager
    def val_step_context(self) -> Iterator[None]:
        yield


class RoundedTeachers(pl.Callback):
    """Keeps frozen teachers' weights in autocast's precision in training steps, where it would round them at each evaluation.

    Results are equal to the last bit. A GPU is spared a kernel for each weight and reading 4 bytes of it; half as much memory
    again holds the rounded ones.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def on_train_start(self, trainer: pl.Trainer, pl_module: Method) -> None:
        round_teachers(pl_module, self.dtype)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Method) -> None:
        round_teachers(pl_module, None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Method) -> None:
        round_teachers(pl_module, self.dtype)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Method) -> None:
        round_teachers(pl_module, None)

    def on_exception(self, trainer: pl.Trainer, pl_module: Method, exception: BaseException) -> None:
        round_teachers(pl_module, None)


def round_teachers(method: Method, dtype: torch.dtype | None) -> None:
    """Round the weights of a method's frozen teachers to `dtype`; None: give the exact ones back."""
    for network in method.frozen_networks():
        if isinstance(network, Teacher):
            network.round_weights(dtype)


class TrainingKernels(pl.Callback):
    """Lets a GPU choose faster kernels inside of training steps; it must come before all callbacks that compute."""

    def __init__(self, tf32: bool, benchmark: bool):
        """Say what is allowed.

        Args:
            tf32: TF32 in matrix products and convolutions.
            benchmark: cuDNN tries its algorithms for each shape of a convolution, and takes the fastest from then on.
        """
        self.tf32, self.benchmark = tf32, benchmark

    def on_train_batch_start(self, *args: Any) -> None:
        allow_tf32(self.tf32)
        torch.backends.cudnn.benchmark = self.benchmark

    def on_train_batch_end(self, *args: Any) -> None:
        allow_tf32(False)
        torch.backends.cudnn.benchmark = False

    def on_exception(self, *args: Any) -> None:
        self.on_train_batch_end()


def allow_tf32(allowed: bool) -> None:
    """Torch's own default is a mixture: yes for convolutions, no for matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def device_kind(accelerator: str) -> tuple[str, tuple[int, int]]:
    """("cuda", its capability) or ("cpu", (0, 0)): where trainer.accelerator will compute."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_capability()
    return "cpu", (0, 0)


def check_precision(precision: str, device: str, capability: tuple[int, int]) -> None:
    """Check that a device can compute in a precision.

    Raises:
        ValueError: For a precision that is unknown, or that the device lacks.
    """
    check_choice("trainer.precision", precision, PRECISIONS)
    if precision == "tf32" and (device != "cuda" or capability < _AMPERE):
        lacks, instead = "an NVIDIA GPU of compute capability 8.0 or higher", "32-true"
    elif precision == "16-mixed" and device != "cuda":
        lacks, instead = "an NVIDIA GPU", "bf16-mixed or 32-true"
    elif precision == "bf16-mixed" and device == "cuda" and capability < _AMPERE:
        lacks, instead = "an NVIDIA GPU of compute capability 8.0 or higher", "16-mixed or 32-true"
    else:
        return
    present = f"a GPU of capability {capability[0]}.{capability[1]}" if device == "cuda" else "a CPU"
    raise ValueError(
        f"trainer.precision={precision} needs {lacks}, and this is {present}: set trainer.precision={instead}"
    )


def precision_plugin(precision: str, device: str, method: Method) -> Precision:
    """Return Lightning's plugin for a precision.

    Raises:
        ValueError: For a method that can't be trained in this precision.
    """
    if precision not in AUTOCAST:
        return Precision()
    if precision == "16-mixed" and (conflict := method.loss_scale_conflict()):
        raise ValueError(
            f"trainer.precision=16-mixed {conflict}, which no loss scale protects: set trainer.precision=bf16-mixed"
        )
    return TrainingAutocast(precision, device)

"""The options under `trainer`: those of this project, made into Lightning's, and those of Lightning's that have no place here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from callbacks import AtomicCheckpointIO
from callbacks.network_layout import NetworkLayout
from launch.allocator import keep_freed_memory
from launch.run.micro_batch import FindMicroBatch
from launch.run.precision import (
    AUTOCAST,
    PRECISIONS,
    RoundedTeachers,
    TrainingKernels,
    allow_tf32,
    check_precision,
    device_kind,
    precision_plugin,
)
from lightning_modules import Method
from stillhouse.checks import check_choice, check_counts
from stillhouse.networks.compiling import check_compile, uses_cuda_graphs

PROFILES = ("simple", "advanced", "torch")
_SKIPPED, _RECORDED = 3, 5  # training steps


def profiler(profile: str | None, folder: Path) -> Profiler | None:
    """Its files appear in folder/profile when training ends.

    simple: seconds by Lightning's actions (fit-simple.txt). advanced: by Python functions in each of these (fit-advanced.txt).
    torch: operators and, on a GPU, kernels of five training steps (fit-torch.txt), and their trace for chrome://tracing.

    Raises:
        ValueError: For another name.
    """
    if profile is None:
        return None
    check_choice("trainer.profile", profile, PROFILES)
    place = {"dirpath": folder / "profile", "filename": profile}
    if profile == "simple":
        return SimpleProfiler(**place, extended=True)
    if profile == "advanced":
        return AdvancedProfiler(**place)
    # Without a limit it would write a trace of every five steps; hooks for modules' names would end compilation.
    schedule = torch.profiler.schedule(wait=_SKIPPED - 1, warmup=1, active=_RECORDED, repeat=1)
    return PyTorchProfiler(**place, schedule=schedule, record_module_names=False)


_ENDLESS = "the data are endless and have no epochs; method.kimg is the budget, in thousands of images"
_SET = "launch/run/build.py sets it"
_ONE_STAGE = "trainer.test and trainer.predict are not used; evaluate.py measures a run"

# Arguments of Lightning's Trainer that would have no effect here, or break what this project promises.
REFUSED = {
    "accumulate_grad_batches": (
        "one batch is one optimiser step, on which progress, resuming and learning rates rest; batch_size is that of the "
        "step, and trainer.micro_batch says how many of its images are in memory at once"
    ),
    "max_epochs": _ENDLESS,
    "min_epochs": _ENDLESS,
    "max_steps": _ENDLESS,
    "min_steps": _ENDLESS,
    "max_time": "a run that stops early would be measured as if it were complete; method.kimg is the budget",
    "limit_train_batches": _ENDLESS,
    "overfit_batches": f"{_ENDLESS}; for a few images give a data set that has no more",
    "limit_val_batches": "method.held_out says how many samples a held-out loss is of",
    "limit_test_batches": _ONE_STAGE,
    "limit_predict_batches": _ONE_STAGE,
    "val_check_interval": "it is called trainer.validate_every_n_steps",
    "check_val_every_n_epoch": "it is called trainer.validate_every_n_steps",
    "num_sanity_val_steps": f"{_SET}; trainer=debug tries every part in a few steps",
    "reload_dataloaders_every_n_epochs": _ENDLESS,
    "use_distributed_sampler": "the data modules give each process its share themselves",
    "fast_dev_run": "it leaves out checkpoints and loggers, which the end of a run needs; use trainer=debug",
    "barebones": "it leaves out checkpoints and loggers, which the end of a run needs; use callbacks=none",
    "enable_checkpointing": "the final evaluation is made from a checkpoint; callbacks.checkpoints says how often one is written",
    "enable_progress_bar": "callbacks.progress shows progress in images; null leaves it out",
    "enable_model_summary": "plan=true shows the sizes of the networks",
    "logger": "choose with logger=NAME (conf/logger)",
    "callbacks": "choose with callbacks=NAME, callbacks.NAME=null (conf/callbacks)",
    "default_root_dir": "choose with name=NAME",
    "profiler": "it is called trainer.profile",
    "plugins": "checkpoints and precision need theirs; trainer.precision chooses the precision",
    "sync_batchnorm": "no network here has a batch norm",
    "enable_autolog_hparams": "the whole config is logged",
    "model_registry": "it is for Lightning's own cloud",
}


class OwnOptions(TypedDict, total=False):
    """Those that this project adds to Lightning's, or narrows."""

    accelerator: str
    devices: int | str | list[int]
    num_nodes: int
    strategy: str
    precision: Literal[PRECISIONS]
    micro_batch: int | Literal["auto"] | None
    compile: bool | str
    channels_last: bool | Literal["auto"]
    benchmark: bool
    gradient_clip_val: float | None
    profile: Literal[PROFILES] | None
    log_every_n_steps: int
    validate_every_n_steps: int


_LIGHTNINGS = {name: kind for name, kind in get_type_hints(pl.Trainer.__init__).items() if name != "return"}
TrainerOptions = TypedDict(
    "TrainerOptions",
    get_type_hints(OwnOptions) | _LIGHTNINGS | get_type_hints(OwnOptions) | dict.fromkeys(REFUSED, Any),
    total=False,
)


def check_options(options: dict[str, Any]) -> None:
    """Check the options under `trainer`.

    Raises:
        ValueError: For an option that is refused, or a value that can't be.
    """
    for option, reason in REFUSED.items():
        if option in options:
            raise ValueError(f"trainer.{option} has no place here: {reason}")
    if options.get("gradient_clip_algorithm") and options["gradient_clip_val"] is None:
        raise ValueError("trainer.gradient_clip_algorithm needs trainer.gradient_clip_val, the limit that it enforces")
    limit = options["gradient_clip_val"]
    if limit is not None and not limit > 0:
        raise ValueError(f"trainer.gradient_clip_val must be a positive number, or null for no limit, got {limit!r}")
    if options["micro_batch"] not in (None, "auto"):
        try:
            check_counts(**{"trainer.micro_batch": options["micro_batch"]})
        except ValueError as error:
            raise ValueError(
                f"{error}; null for the device's whole share, auto to find the largest that fits"
            ) from None
    check_compile("trainer.compile", options["compile"])
    check_choice("trainer.channels_last", options["channels_last"], ("auto", True, False))


def choose_channels_last(value: bool | str, device: str, precision: str, compiled: bool | str) -> bool:
    """Whether images and convolutions have their channels innermost in memory; auto: where that is known to be faster.

    On a CPU oneDNN computes convolutions in low precision in that layout. On a GPU cuDNN does so too, but PyTorch's group norm
    copies its input to the contiguous one (up to 2.14 at least), unless it is compiled.

    Args:
        value: `trainer.channels_last`.
        device: "cpu" or "cuda".
        precision: One of `PRECISIONS`.
        compiled: `trainer.compile`.
    """
    return value if value != "auto" else precision in AUTOCAST and (device == "cpu" or bool(compiled))


def lightning_options(
    options: dict[str, Any], method: Method, folder: Path, here: bool = True, owner: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[pl.Callback]]:
    """Lightning's options for those of `conf/trainer`, and callbacks that make up for the rest, which come before all others.

    Args:
        options: As `check_options` wants them.
        method: What it does itself (micro-batches, limits of gradients) is set on it.
        folder: The run's.
        here: Whether this machine must be able to do it.
        owner: Which run the checkpoints are of, as `folder.identity` says it.

    Raises:
        ValueError: For what the device or the method lacks.
    """
    options = dict(options)
    device, capability = device_kind(options["accelerator"])
    precision = options.pop("precision")
    check_choice("trainer.precision", precision, PRECISIONS)
    if here:
        check_precision(precision, device, capability)
    allow_tf32(False)  # but in training steps that ask for it
    if here and device == "cpu":
        keep_freed_memory()
    plugin = precision_plugin(precision, device, method)
    micro_batch = options.pop("micro_batch")
    method.micro_batch = micro_batch if micro_batch != "auto" else None
    if (
        norm := options.pop("gradient_clip_val")
    ) is not None:  # the methods optimise by hand, where Lightning limits nothing
        if options.get("gradient_clip_algorithm", "norm") != "norm":
            raise ValueError("trainer.gradient_clip_algorithm: norms of gradients alone are limited; leave it out")
        if method.gradient_clip is not None:
            raise ValueError(
                f"trainer.gradient_clip_val={norm} and method.clip={method.gradient_clip} both limit the norm of each network's "
                "gradient; set one of them to null"
            )
        method.gradient_clip = norm
    if here and device != "cuda" and uses_cuda_graphs(options["compile"]):
        raise ValueError(
            f"trainer.compile={options['compile']} records CUDA graphs, which need an NVIDIA GPU, and this is a CPU: set "
            "trainer.compile=true, or max-autotune-no-cudagraphs"
        )
    compiled = options.pop("compile")
    form = NetworkLayout(compiled, choose_channels_last(options.pop("channels_last"), device, precision, compiled))
    benchmark = options.pop("benchmark") and not options.get("deterministic")
    callbacks = [TrainingKernels(precision == "tf32", benchmark)] if device == "cuda" else []
    callbacks += [RoundedTeachers(AUTOCAST[precision])] if precision in AUTOCAST else []
    callbacks += [form] if form.compile or form.channels_last else []
    callbacks += [FindMicroBatch()] if micro_batch == "auto" else []
    return options | {
        "plugins": [plugin, AtomicCheckpointIO(owner)],
        "profiler": profiler(options.pop("profile"), folder),
    }, callbacks

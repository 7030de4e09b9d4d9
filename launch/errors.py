"""What a user reads on stderr: bad input as one line, not as a traceback, and nothing of what libraries say by design."""

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.errors import CompactHydraException, ConfigCompositionException, HydraException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from launch.command_line import explained
from launch.process_environment import is_rank_zero
from launch.run.folder import RunInUse

# What bad input and broken files raise here. A programming error (TypeError, KeyError, ...) keeps its traceback.
EXPECTED = (
    ValueError,
    OSError,
    FloatingPointError,
    MisconfigurationException,
    HydraException,
    OmegaConfBaseException,
)


# What the CPU's allocator, cuBLAS and cuDNN say where torch has no exception of its own.
_NO_ROOM = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED")

# Seconds in which a child process lets the first one speak, which mostly has met the same error and then ends it.
GRACE = 3

# Messages of libraries: what each says is so by design, for the reason beside it.
_BY_DESIGN = (
    r"Found \d+ module\(s\) in eval mode",  # students without dropout stay in eval mode
    r"find_unused_parameters=True was specified",  # some methods need it, launch/run/processes.py
    r"The `srun` command is available",  # one process may well run beside SLURM
    r"Be aware that when using `ckpt_path`.*'FindMicroBatch",  # a run may go on without it
    r".*does not have many workers",  # memory maps are slower with workers
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class JobFailed(CompactHydraException):
    """A job of a sweep ended in an error that has been reported already; Hydra exits with code 1 after the last job."""


class JobInUse(JobFailed):
    """The job's run is trained already, by another process: what an earlier call's launcher left behind."""


@contextmanager
def reported(job: str, *, sweep: bool = False, shared: bool = False) -> Iterator[None]:
    """Report expected errors in one line naming `job`; exit, or in a sweep let the other jobs go on.

    Other errors keep their traceback, and with HYDRA_FULL_ERROR=1 so do these. shared: whether other jobs write to the same
    stream at once, where one's progress bar may be under way: then the line begins a new one.
    """
    try:
        yield
    except Exception as error:
        if not is_rank_zero():  # also of what a collective says when the first process has gone
            time.sleep(GRACE)
        if not (expected(error) or collective(error)) or os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            if sweep:  # Hydra shows the error of the first failed job alone, and after the last job
                traceback.print_exc()
            raise
        # In one write: several jobs may speak.
        sys.stderr.write("\n" * shared + f"error: {job}: {one_line(error)}\n")
        sys.stderr.flush()
        if sweep:
            raise (JobInUse if isinstance(error, RunInUse) else JobFailed)(one_line(error)) from None
        sys.exit(1)


def expected(error: Exception) -> bool:
    # wandb's (no key, no network) by name: importing it takes half a second.
    return isinstance(error, EXPECTED) or out_of_memory(error) or type(error).__module__.startswith("wandb.")


def collective(error: BaseException) -> bool:
    """Whether it may be what a collective says when another process has gone."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no room for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_ROOM)
    )


def one_line(error: BaseException) -> str:
    """The innermost message, behind the config key that Hydra or OmegaConf adds to it."""
    if isinstance(error, ConfigCompositionException):  # of a sweep's job
        return explained(error)
    key = re.search(r"full_key: (\S+)", str(error))
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).partition("full_key: ")[0].split())
    if out_of_memory(error):
        text = (
            f"out of memory ({text.partition('. ')[0]}): lower trainer.micro_batch, or set it to auto, where this is "
        )
        text += "training, and evaluation.batch_size where it is sampling"
    if collective(error):
        text = f"another process of this run has ended ({text.partition(': ')[0]})"
    if isinstance(error, TypeError) and "argument" not in text:  # a comparison or the like, deep inside
        text = f"an option has the wrong type ({text})"
    if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
        text = f"{text}: {error.filename}"
    return f"{key[1]}: {text}" if key else text


def quiet() -> None:
    """Lightning's start-up lines (devices, tips for other products) and warnings about what is done on purpose."""
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in _BY_DESIGN:
        warnings.filterwarnings("ignore", message=message)

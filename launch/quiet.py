"""Messages of the libraries below that are no news to a user of this project."""

import logging
import warnings

# What each says is so by design: see the reason beside it.
_BY_DESIGN = (
    r"Found \d+ module\(s\) in eval mode",  # students without dropout stay in eval mode
    r"find_unused_parameters=True was specified",  # some methods need it, launch/run/processes.py
    r"The `srun` command is available",  # one process may well run beside SLURM
    r"Be aware that when using `ckpt_path`.*'FindMicroBatch",  # a run may go on without it
    r".*does not have many workers",  # memory maps are slower with workers
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet() -> None:
    """Lightning's start-up lines (devices, tips for other products) and warnings about what is done on purpose."""
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in _BY_DESIGN:
        warnings.filterwarnings("ignore", message=message)

"""Which process this is, before torch.distributed knows: started by Lightning, by srun or by torchrun."""

import os

_INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which a user types commands, as Lightning has it


def under_torchrun() -> bool:
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def under_srun() -> bool:
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE


def started_processes() -> int | None:
    """How many processes torchrun or srun started; None where Lightning has to start all but this one."""
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ["SLURM_NTASKS"]) if under_srun() else 1
    return tasks if tasks > 1 else None


def is_rank_zero() -> bool:
    """Also true before the process group exists, in the process that the user started."""
    if under_torchrun():
        return int(os.environ["RANK"]) == 0
    if started_processes():
        return int(os.environ["SLURM_PROCID"]) == 0
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0

"""A run that SIGUSR1 ended is handed back to SLURM, whose next job is the same command and goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from callbacks.requeue import NOTICE, Requeued
from launch.ranks import is_rank_zero


@contextmanager
def requeueing(job: str) -> Iterator[None]:
    """Within the block SIGUSR1 ends the process in order: exit code 0, or 1 where SLURM didn't take the job back.

    Rank zero says how `job` goes on. A sweep ends too: the same command goes on with its unfinished jobs.
    """
    decides = is_rank_zero()
    try:
        NOTICE.heed(decides)
        yield
    except Requeued as end:
        NOTICE.end()
        sys.exit(_hand_back(f"{job}: stopped by SIGUSR1, {end}") if decides else 0)
    except Exception:
        if decides or not NOTICE.given:
            raise
        sys.exit(0)  # rank zero has ended by then, and a collective failed
    finally:
        NOTICE.end()


def _hand_back(message: str) -> int:
    """The exit code."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        print(f"{message}; the same command goes on", flush=True)
        return 0
    try:
        asked = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True, check=False)
        failure = asked.returncode and (asked.stderr.strip() or f"exit code {asked.returncode}")
    except OSError as error:
        failure = error.strerror
    if failure:
        print(f"error: {message}, but scontrol requeue {number} failed ({failure}); submit it again", file=sys.stderr)
        return 1
    print(f"{message}; SLURM job {number} is requeued and goes on", flush=True)
    return 0

"""Files that one process at a time holds: who trains a run, who runs a search, who computes on a GPU."""

import fcntl
import os
from pathlib import Path


def take(path: Path, *, needed: bool = True) -> int | None:
    """An open descriptor that holds the file's lock until it is closed; None where another process has it.

    needed: whether a disk without locks is an error (OSError), or as good as one that nobody holds.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        if needed:
            os.close(lock)
            raise
    return lock

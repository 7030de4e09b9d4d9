"""Commands that are refused, one after another in one process: a tenth of a second each, so that there may be hundreds."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from end_to_end_tools import LIMIT, Ended, become, forked, new_outputs

_shared: tuple[multiprocessing.Process, Connection] | None = None


def attempt(folder: Path, script: str, *arguments: str) -> Ended:
    """`python SCRIPT ARGUMENTS` in `folder`, in the process that all attempts share until one of them is not refused.

    What a command changed in the process (signal handlers, the environment, Hydra's state) is undone after it; what else it may
    leave behind is why only a refused command, which has begun nothing, may be followed by another one. `hydra.mode` is not
    read, -m is.
    """
    global _shared
    out, err = new_outputs(folder)
    if _shared is None:
        ours, theirs = multiprocessing.Pipe()
        _shared = forked(_serve, (theirs,)), ours
        theirs.close()
        atexit.register(ours.close)  # ends the process, for which the end of this one waits
    process, pipe = _shared
    pipe.send((folder, script, arguments, out, err))
    code = None
    try:
        code = pipe.recv() if pipe.poll(LIMIT) else None
    except EOFError:
        process.join()
        code = process.exitcode
    if code != 1:
        process.kill()
        process.join()
        pipe.close()
        _shared = None
    if code is None:
        raise TimeoutError(err.read_text())
    return Ended(code, out.read_text(), err.read_text())


def _serve(pipe: Connection) -> None:
    from hydra._internal.hydra import Hydra

    # Hydra composes the config once for its mode and once to use it, each as long as all else here.
    Hydra.get_mode = lambda self, config_name, overrides: None
    while True:
        try:
            request = pipe.recv()
        except EOFError:  # the tests have ended
            return
        pipe.send(_one(*request))


def _one(folder: Path, script: str, arguments: tuple[str, ...], out: Path, err: Path) -> int:
    from hydra.core.global_hydra import GlobalHydra

    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    GlobalHydra.instance().clear()
    become(folder, script, arguments, out, err)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)

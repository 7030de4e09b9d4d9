"""Permissions, which do not bind root."""

import ctypes
import os

_VERSION, _OVERRIDE = 0x20080522, 1 << 1  # of Linux' capget; CAP_DAC_OVERRIDE


def bound_by_permissions() -> None:
    """From now on a process of root's is refused what permissions refuse any other user."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~_OVERRIDE  # effective
    sets[1] &= ~_OVERRIDE  # permitted
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")

"""Memory that a step on the CPU has freed stays with the process, for the next step: faster, and nothing else changes.

glibc gives large blocks back to the system as they are freed, and the next step gets them again a page of 4 KiB at a time,
each filled with zeros first. So an update of diff_instruct on the digits took 5 to 10 % more CPU time, and another 5 % for want
of huge pages (AMD EPYC, one thread, in turns); at EDM's CIFAR-10 architecture, whose convolutions are most of the time, 0.5 %.
"""

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20  # sys/mman.h; bytes of a huge page
_RESERVED = 16 << 30  # bytes of addresses; memory itself is taken as it is used
_USERS = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed from now on, in huge pages where the system has them; elsewhere nothing happens.

    What the user has set for the allocator stays as it is.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or any(name in os.environ for name in _USERS):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = min(_RESERVED, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    block = libc.malloc(size)  # the heap grows by so much, and keeps it
    if not block:
        return
    libc.free(block)
    end = libc.sbrk(0)
    if 0 <= end - (block + size) < _HUGE:  # else the block lay elsewhere
        start = -(-block // _HUGE) * _HUGE
        libc.madvise(start, (end - start) // _HUGE * _HUGE, _MADV_HUGEPAGE)

"""Memory that a process has freed: kept for what it asks for next, or given back."""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 * 2**20
_LARGEST_BLOCK = 32 * 2**20  # glibc refuses to keep larger ones among the small


def keep_freed_memory() -> bool:
    """Whether freed memory, up to 256 MiB, now stays with the process instead of the system.

    A layer's activations are freed and asked for again many times a second. By default glibc gives
    every such block back, and each new one costs page faults: a tenth of a forward pass of 512 ids.
    This is a setting of the whole process; nothing is changed where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    trim = libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    return bool(trim) and bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK))


def return_freed_memory() -> None:
    """Collect garbage, and have the C library return its free pages (glibc; elsewhere nothing).

    After a model of half a gigabyte is released, glibc keeps most of it in its heap; the resident
    set of the next session in the process would include it.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)

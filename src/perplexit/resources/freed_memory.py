"""Memory that was freed, back to the system: else it counts for whatever is measured next."""

import ctypes
import gc
import sys


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

"""Advice to the operating system about memory that is no longer needed (Linux; elsewhere nothing).

Pages of a mapped file that were copied into another layout are released, and so is the memory
that the C library keeps after it was freed. The trick `memory_advice`, see `engine_tricks`.
"""

import ctypes
import gc
import mmap
import sys
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Self

import psutil

from perplexit.resources.engine_tricks import is_on

_DONTNEED = 4  # of Linux's madvise: pages go, and are read from the file again when touched


def _c_function(name: str) -> Any | None:
    """Return a function of the C library; None off Linux, without it, or with the trick off."""
    if not sys.platform.startswith("linux") or not is_on("memory_advice"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


def return_freed_memory() -> None:
    """Collect garbage, and return the C library's free pages to the system (glibc only).

    After a model of half a gigabyte is released, glibc keeps most of it in its heap; the resident
    set of the next session in the process would include it.
    """
    gc.collect()
    trim = _c_function("malloc_trim")  # musl has none
    if trim is not None:
        trim(0)


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Where unchanged files lie in this process's memory: (start, end) addresses, ascending.

    A mapping is left out where one of its pages was written to: that page is no longer the file's.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_this_process(cls) -> Self:
        """Return the mappings as they are now; none where `madvise` cannot be called."""
        if _c_function("madvise") is None:
            return cls()
        found = []
        for each in psutil.Process().memory_maps(grouped=False):
            written_to = each.anonymous or each.swap  # in memory, or moved out of it
            if each.path.startswith("/") and not written_to:
                start, _, end = each.addr.partition("-")
                found.append((int(start, 16), int(end, 16)))
        return cls(tuple(sorted(found)))

    def forget(self, address: int, num_bytes: int) -> int:
        """Release the whole pages within these bytes, and return how many bytes were released.

        Their content does not change: it is read from the file again when it is needed. Memory
        outside one mapping, and the pages at both ends that hold something else too, are kept.
        """
        index = bisect_right(self.ranges, (address, sys.maxsize)) - 1
        if index < 0 or address + num_bytes > self.ranges[index][1]:
            return 0
        page = mmap.PAGESIZE
        start, end = -(-address // page) * page, (address + num_bytes) // page * page
        advise = _c_function("madvise")
        if end <= start or advise is None:
            return 0
        failed = advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
        return 0 if failed else end - start

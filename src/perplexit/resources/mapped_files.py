"""Files that are mapped into this process's memory, and the pages of them that it holds."""

import ctypes
import mmap
import sys
from bisect import bisect_right
from dataclasses import dataclass
from typing import Self

import psutil

_DONTNEED = 4  # of Linux: pages go, and are read from the file again where they are touched


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Where unchanged files lie in this process's memory: (start, end) addresses, ascending.

    A mapping of which one page was written to is not among them: that page is no longer the file's.
    Empty where the system is not Linux.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_this_process(cls) -> Self:
        """As they are now."""
        if sys.platform != "linux":
            return cls()
        found = []
        for each in psutil.Process().memory_maps(grouped=False):
            written_to = each.anonymous or each.swap  # in memory, or moved out of it
            if each.path.startswith("/") and not written_to:
                start, _, end = each.addr.partition("-")
                found.append((int(start, 16), int(end, 16)))
        return cls(tuple(sorted(found)))

    def forget(self, address: int, num_bytes: int) -> int:
        """Let go of the pages that lie within these bytes, all of one mapping; how many bytes went.

        They stay what they were: whoever reads them has them from the file again. Memory that is
        no file's, and the pages at both ends that hold something else too, are left alone.
        """
        index = bisect_right(self.ranges, (address, sys.maxsize)) - 1
        if index < 0 or address + num_bytes > self.ranges[index][1]:
            return 0
        page = mmap.PAGESIZE
        start, end = -(-address // page) * page, (address + num_bytes) // page * page
        if end <= start:
            return 0
        libc = ctypes.CDLL(None)
        failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
        return 0 if failed else end - start

"""Memory whose pages come and go when the test says so."""

import mmap

import numpy as np


def mapped(num_bytes: int) -> np.ndarray:
    """Memory that is touched and, once deleted, with the system: no allocator keeps it.

    What NumPy frees may stay with the process, and what it then asks for may be there already:
    sessions of earlier tests have told the C library to keep freed memory.
    """
    block = np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)
    block.fill(1)
    return block

"""Windows: what one forward pass sees, and which of its tokens are scored.

Shape suffixes: T = ids fed forward in one window, N = scored tokens (targets) of one window.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class PrefixMode(IntEnum):
    """How a window's prefix token (a BOS) enters the ids that are fed forward."""

    NONE = 0
    INSERT = 1  # [prefix_id] + ids[start:stop]
    OVERWRITE = 2  # [prefix_id] + ids[start + 1 : stop]


@dataclass(frozen=True, slots=True)
class Window:
    """One row of the window table, in token indices of its document (half-open ranges).

    The tokens `target_start … target_stop - 1` are scored; those before are context.
    """

    document: int
    start: int
    stop: int
    target_start: int
    target_stop: int
    prefix_mode: PrefixMode = PrefixMode.NONE
    prefix_id: int = -1


@dataclass(frozen=True, slots=True)
class WindowIds:
    """One window as an engine is fed it: ids, and the positions in them that are scored.

    index:     row of the window table.
    ids_T:     int32, the ids fed forward, the prefix and the last target included.
    targets_N: int64, strictly increasing positions in `ids_T`, each at least 1; the loss of
               target n is -log p(ids_T[targets_N[n]] | ids_T[:targets_N[n]]).
    """

    index: int
    ids_T: NDArray[np.int32]
    targets_N: NDArray[np.int64]

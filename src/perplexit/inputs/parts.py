"""Windows divided among workers that run side by side."""

from collections.abc import Sequence

import numpy as np


def balanced_parts(lengths: Sequence[int], *, workers: int, most_ids: int) -> list[range]:
    """Places 0, 1, … of windows as runs of about equal numbers of ids, in order.

    lengths: the windows' ids, longest first. There are as many parts as workers, or a multiple, so
    that all have something to do until the end; fewer where windows are fewer. A part holds about
    `most_ids` ids at most, or a single window.
    """
    ids = np.asarray(lengths, np.int64)
    if not len(ids):
        return []
    rounds = -(-int(ids.sum()) // (workers * most_ids))
    count = min(len(ids), rounds * workers)
    middles = np.cumsum(ids) - ids / 2
    part_of = np.minimum(middles * count // ids.sum(), count - 1).astype(np.int64)
    stops = np.searchsorted(part_of, np.arange(count), side="right").tolist()
    starts = [0, *stops[:-1]]
    return [range(a, b) for a, b in zip(starts, stops, strict=True) if a < b]

"""Which cases of a long proof run: all of them, or the same tenth each time."""

import os
import random
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")
WHOLE = os.environ.get("PERPLEXIT_PROOFS") == "all"
SEED = 20_261_127


def chosen(cases: Sequence[Case], *, share: float = 0.1) -> list[Case]:
    """Return every case with `PERPLEXIT_PROOFS=all`, else a seeded share of them, in order."""
    if WHOLE:
        return list(cases)
    count = max(1, round(share * len(cases)))
    places = sorted(random.Random(SEED).sample(range(len(cases)), count))
    return [cases[place] for place in places]


def times(whole: int, *, share: float = 0.1) -> int:
    """Return how many random trials to run: `whole` of them, or a share."""
    return whole if WHOLE else max(1, round(share * whole))

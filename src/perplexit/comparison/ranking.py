"""Several candidates in one order, ties shown as ties."""

from collections.abc import Sequence
from dataclasses import dataclass

from perplexit.comparison.comparing import compare
from perplexit.comparison.record import Comparison
from perplexit.runs.run import Run


@dataclass(frozen=True, slots=True)
class RankedRun:
    """A run's place: 1 is the lowest perplexity; runs that cannot be told apart share a place."""

    rank: int
    name: str
    comparison: Comparison  # against the reference


def ranked(
    candidates: Sequence[tuple[str, Run]], comparisons: Sequence[Comparison]
) -> list[RankedRun]:
    """The candidates, each with its comparison to the reference, from best to worst.

    A candidate shares the place of the one before it where their paired comparison says "not
    distinguishable"; being told apart from the best of a tied group opens the next place.
    """
    order = sorted(
        range(len(candidates)), key=lambda index: comparisons[index].log_perplexity_difference
    )
    places: list[RankedRun] = []
    leader: Run | None = None
    rank = 0
    for position, index in enumerate(order, start=1):
        name, run = candidates[index]
        if leader is None or compare(leader, run, num_most_changed=0).verdict != (
            "not distinguishable"
        ):
            leader, rank = run, position
        places.append(RankedRun(rank, name, comparisons[index]))
    return places

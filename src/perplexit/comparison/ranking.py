"""Several candidates in one order, ties shown as ties."""

from collections.abc import Sequence
from dataclasses import dataclass

from perplexit.comparison.compare_by_token import compare
from perplexit.comparison.token_comparison import Comparison
from perplexit.runs.run import Run


@dataclass(frozen=True, slots=True)
class RankedRun:
    """A run's place: 1 is the lowest perplexity; equivalent and inconclusive pairs share one."""

    rank: int
    name: str
    comparison: Comparison  # against the reference


def ranked(
    candidates: Sequence[tuple[str, Run]],
    comparisons: Sequence[Comparison],
    *,
    confidence: float = 0.95,
    noise_floor: float = 0.0,
    margin: float | str = 0.0,
) -> list[RankedRun]:
    """The candidates, each with its comparison to the reference, from best to worst.

    A candidate shares the place of the best of the group before it, unless the paired comparison
    of the two says that it is worse. confidence, noise_floor, margin: those of `compare`.
    """

    def told_apart(best: Run, run: Run) -> bool:
        found = compare(
            best,
            run,
            confidence=confidence,
            noise_floor=noise_floor,
            margin=margin,
            num_most_changed=0,
        )
        return found.verdict in ("worse", "better")

    order = sorted(
        range(len(candidates)), key=lambda index: comparisons[index].log_perplexity_difference
    )
    places: list[RankedRun] = []
    leader: Run | None = None
    rank = 0
    for position, index in enumerate(order, start=1):
        name, run = candidates[index]
        if leader is None or told_apart(leader, run):
            leader, rank = run, position
        places.append(RankedRun(rank, name, comparisons[index]))
    return places

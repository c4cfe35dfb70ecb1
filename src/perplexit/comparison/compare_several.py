"""Compare one reference with any number of candidates: verdicts, gates and one order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexit.comparison.byte_comparison import ByteComparison
from perplexit.comparison.compare_by_byte import compare_bytes
from perplexit.comparison.compare_by_token import compare
from perplexit.comparison.gates import GateResult, JudgedOn, judge, junit_xml, markdown, parse_gate
from perplexit.comparison.pairing import only_by_bytes, opened
from perplexit.comparison.token_comparison import Comparison
from perplexit.runs.run import Run


@dataclass(frozen=True, repr=False)
class ComparedRuns:
    """Candidates against one reference, in the order given.

    ranks: each candidate's place, 1 for the lowest perplexity, ties sharing one; empty for a
        single candidate, and where a candidate could only be compared byte by byte.
    """

    names: list[str]
    comparisons: list[Comparison | ByteComparison]
    gates: list[list[GateResult]]
    ranks: list[int]

    @property
    def failed(self) -> list[GateResult]:
        """Return the gates that do not hold."""
        return [result for results in self.gates for result in results if not result.passed]

    def to_json(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Return a candidate's document, or a list of them where there are several."""
        documents = []
        for index, comparison in enumerate(self.comparisons):
            document = comparison.to_json()
            if self.gates[index]:
                document["gates"] = [result.to_json() for result in self.gates[index]]
            if self.ranks:
                document["rank"] = self.ranks[index]
            documents.append(document)
        return documents[0] if len(documents) == 1 else documents

    def gates_as_junit_xml(self) -> str:
        """Return the gates as a JUnit test report."""
        return junit_xml(dict(zip(self.names, self.gates, strict=True)))

    def gates_as_markdown(self) -> str:
        """Return the gates as a Markdown table."""
        return markdown(dict(zip(self.names, self.gates, strict=True)))

    def __repr__(self) -> str:
        pairs = zip(self.names, self.comparisons, strict=True)
        return f"ComparedRuns({', '.join(f'{name}: {found.verdict}' for name, found in pairs)})"

    def __str__(self) -> str:
        lines = []
        for name, comparison, results in zip(self.names, self.comparisons, self.gates, strict=True):
            lines += [name, str(comparison), *map(str, results), ""]
        if self.ranks:
            lines.append("ranking, best first (a shared place is a tie):")
            places = sorted(zip(self.ranks, self.names, strict=True))
            lines += [f"  {rank}. {name}" for rank, name in places]
        return "\n".join(lines).rstrip()


def compare_runs(
    reference: Run | str | Path,
    candidates: Sequence[Run | str | Path],
    *,
    confidence: float = 0.95,
    noise_floor: float = 0.0,
    margin: float | str = 0.0,
    num_most_changed: int = 10,
    gates: Sequence[str] = (),
    gates_on: JudgedOn = "interval",
) -> ComparedRuns:
    """Compare each candidate with the reference, judge the gates, and rank several candidates.

    Runs of different tokenizers or windows over the same text are compared byte by byte, where
    token perplexities would say nothing. gates: `METRIC<=NUMBER` and so on, or a preset's name.
    confidence, noise_floor, margin: as in `compare`; the ranking follows them too.
    Raises FingerprintMismatchError for different texts, UsageError for what is no gate.
    """
    parsed = [parse_gate(gate) for gate in gates]
    base = opened(reference)
    runs = [opened(candidate) for candidate in candidates]
    names = [
        str(c.folder or c.model["address"]) if isinstance(c, Run) else str(c) for c in candidates
    ]
    options: Any = {"confidence": confidence, "noise_floor": noise_floor, "margin": margin}
    comparisons: list[Comparison | ByteComparison] = [
        (compare_bytes if only_by_bytes(base, run) else compare)(
            base, run, num_most_changed=num_most_changed, **options
        )
        for run in runs
    ]
    results = [judge(comparison, parsed, judged_on=gates_on) for comparison in comparisons]
    return ComparedRuns(names, comparisons, results, _ranks(runs, comparisons, options))


def _ranks(
    runs: list[Run], comparisons: list[Comparison | ByteComparison], options: dict[str, Any]
) -> list[int]:
    """Return each candidate's place; nothing for one candidate, or where one has no tokens."""
    by_token = [c for c in comparisons if isinstance(c, Comparison)]
    if len(runs) < 2 or len(by_token) < len(runs):
        return []
    places = ranked([(str(index), run) for index, run in enumerate(runs)], by_token, **options)
    rank_of = {place.name: place.rank for place in places}
    return [rank_of[str(index)] for index in range(len(runs))]


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
    """Return the candidates with their comparisons to the reference, from best to worst.

    A candidate shares the place of the best of the group before it, unless the paired comparison
    of the two says that it is worse. confidence, noise_floor, margin: those of `compare`.
    """
    options: Any = {"confidence": confidence, "noise_floor": noise_floor, "margin": margin}

    def told_apart(best: Run, run: Run) -> bool:
        found = compare(best, run, num_most_changed=0, **options)
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

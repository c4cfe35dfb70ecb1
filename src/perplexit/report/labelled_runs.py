"""What a report is about: runs over one input, the first of them the reference, and their names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perplexit.comparison import Comparison, compare
from perplexit.comparison.byte_comparison import ByteComparison
from perplexit.comparison.compare_by_byte import compare_bytes
from perplexit.comparison.pairing import only_by_bytes
from perplexit.comparison.verdict_record import precision_name
from perplexit.errors import UsageError
from perplexit.runs.run import Run

LARGEST_NUMBER_OF_RUNS = 8  # as many as there are colours that can be told apart


@dataclass(frozen=True)
class LabelledRuns:
    """Runs with their labels, and a comparison with the reference for each but the first."""

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    comparisons: tuple[Comparison, ...]  # of runs[1:]
    confidence: float
    aligned: tuple[tuple[str, ByteComparison], ...] = ()  # (label, comparison byte by byte)

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        *,
        labels: Sequence[str] | None = None,
        confidence: float = 0.95,
        noise_floor: float = 0.0,
        margin: float | str = 0.0,
        num_most_changed: int = 20,
    ) -> "LabelledRuns":
        """Compare the runs with the first of them; by bytes where the same text has other tokens.

        Raises UsageError for no run, too many, or another number of labels; RunError for a run
        that is not complete; FingerprintMismatchError, which says what differs, for runs over
        different texts.
        """
        if not 1 <= len(runs) <= LARGEST_NUMBER_OF_RUNS:
            raise UsageError(
                f"expected 1 to {LARGEST_NUMBER_OF_RUNS} runs in a report, got {len(runs)}; "
                "write several reports"
            )
        if labels is not None and len(labels) != len(runs):
            raise UsageError(
                f"expected a label for each of {len(runs)} runs, got {len(labels)}; "
                "give one for each, in their order"
            )
        for run in runs:
            _ = run.tokens  # not complete: said before anything is computed
        names = tuple(labels) if labels is not None else labels_of(runs)
        by_bytes = [only_by_bytes(runs[0], run) for run in runs]
        options: Any = {
            "confidence": confidence,
            "noise_floor": noise_floor,
            "margin": margin,
            "num_most_changed": num_most_changed,
        }
        own = [index for index, other in enumerate(by_bytes) if not other]
        return cls(
            runs=tuple(runs[index] for index in own),
            labels=tuple(names[index] for index in own),
            comparisons=tuple(compare(runs[0], runs[index], **options) for index in own[1:]),
            confidence=confidence,
            aligned=tuple(
                (name, compare_bytes(runs[0], run, **options))
                for name, run, other in zip(names, runs, by_bytes, strict=True)
                if other
            ),
        )

    @property
    def reference(self) -> Run:
        """Return the run that the others are compared with."""
        return self.runs[0]

    @property
    def candidates(self) -> list[tuple[str, Run, Comparison]]:
        """Return (label, run, comparison with the reference) of every other run."""
        return list(zip(self.labels[1:], self.runs[1:], self.comparisons, strict=True))


def labels_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return a unique short name for each run: its folder's, else its engine and precision."""
    names = [_name_of(run) for run in runs]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    if repeated:
        names = [
            f"{name} ({precision_name(run.session)})" if name in repeated else name
            for name, run in zip(names, runs, strict=True)
        ]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return tuple(labels)


def _name_of(run: Run) -> str:
    if run.folder is not None:
        return run.folder.resolve().name
    return precision_name(run.session) or str(run.model.get("address", "run"))


def peak_bytes_of(run: Run) -> tuple[int | None, str]:
    """Return (peak memory in bytes, where): of the accelerator if it was used, else the process."""
    device = run.peak_memory_bytes.get("torch_device")
    if device:
        return device, "device"
    return run.peak_memory_bytes.get("host_rss"), "process"

"""ByteComparison: a candidate against a reference over one text, byte by byte."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.verdict_record import VerdictRecord, estimate_text, run_name
from perplexit.comparison.verdict_sentences import Judged
from perplexit.errors import EmptyScoreError
from perplexit.metrics.estimate import Estimate
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText

_GATE_FIGURES = (
    "bits_per_byte_ratio",
    "bits_per_byte_difference",
    "byte_ratio",
    "log_difference",
    "bits_per_byte_candidate",
)
_MAIN_FIGURES = {
    "bits_per_byte_reference": "bits per byte, reference",
    "bits_per_byte_candidate": "bits per byte, candidate",
    "bits_per_byte_difference": "change, bits per byte",
    "byte_ratio": "byte perplexity ratio",
}


@dataclass(frozen=True, slots=True)
class ChangedSegment:
    """Bytes on which the two models differ; `delta` = candidate - reference, nats."""

    document: int
    byte_start: int  # in the document's UTF-8
    text: str
    context: str  # the text right before
    nll_reference: float
    nll_candidate: float
    delta: float


@dataclass(frozen=True, kw_only=True, repr=False)
class ByteComparison(VerdictRecord):
    """A candidate against a reference over the bytes that both scored, whatever their tokenizers.

    bits_per_byte_*: of each run over the `num_bytes` common bytes (not its own figure, which
        counts the bytes that it scored alone too).
    log_difference:  mean of candidate - reference, nats per byte; above 0 is worse.
    byte_ratio:      exp of it: the candidate's byte perplexity over the reference's.
    bits_per_byte_ratio: the candidate's bits per byte over the reference's.
    num_segments:    stretches between common token boundaries that both runs scored whole.
    num_unaligned_bytes_*: bytes that the run scored but that are not in a common segment.
    `margin` is in nats per byte, `margin_asked` a share of the byte perplexity.
    """

    unit: str = "byte"
    bits_per_byte_reference: float
    bits_per_byte_reference_low: float | None = None
    bits_per_byte_reference_high: float | None = None
    bits_per_byte_candidate: float
    bits_per_byte_candidate_low: float | None = None
    bits_per_byte_candidate_high: float | None = None
    bits_per_byte_difference: float
    bits_per_byte_difference_low: float | None
    bits_per_byte_difference_high: float | None
    log_difference: float
    log_difference_low: float | None
    log_difference_high: float | None
    byte_ratio: float
    byte_ratio_low: float | None
    byte_ratio_high: float | None
    bits_per_byte_ratio: float
    bits_per_byte_ratio_low: float | None
    bits_per_byte_ratio_high: float | None
    num_bytes: int
    num_segments: int
    num_tokens_reference: int
    num_tokens_candidate: int
    num_unaligned_bytes_reference: int
    num_unaligned_bytes_candidate: int
    text_fingerprint: str
    same_tokenizer: bool
    most_changed: tuple[ChangedSegment, ...] = ()

    def figures(self) -> dict[str, Estimate]:
        """Return the figures by the names that gates use."""
        return {name: self.estimate(name) for name in _GATE_FIGURES}

    def _main_figures(self) -> dict[str, Estimate]:
        return {text: self.estimate(name) for name, text in _MAIN_FIGURES.items()}

    @property
    def judged(self) -> Judged:
        """Return the difference and its margin, from which the verdict is put into words."""
        return Judged(
            self.estimate("log_difference"), self._margin, unit=self.unit, num_units=self.num_bytes
        )

    def __repr__(self) -> str:
        ratio = estimate_text(self.estimate("byte_ratio"), ".6g", basis=False)
        return f"ByteComparison({self.verdict}: byte ratio {ratio}, {self.num_bytes:,} bytes)"

    def __str__(self) -> str:
        ours, theirs = self.bits_per_byte_reference, self.bits_per_byte_candidate
        bits = estimate_text(self.estimate("bits_per_byte_difference"), "+.2e", basis=False)
        lines = [
            f"verdict:    {self.verdict} (byte by byte: the tokens differ). {self.sentence}",
            f"reference:  {ours:.6g} bits per byte  {run_name(self.reference)}",
            f"candidate:  {theirs:.6g} bits per byte  {run_name(self.candidate)}",
            f"ratio:      {estimate_text(self.estimate('byte_ratio'), '.6f')}, "
            "of the byte perplexities",
            f"change:     {bits} bits per byte",
            f"aligned:    {self.num_bytes:,} bytes in {self.num_segments:,} common segments "
            f"({self.num_tokens_reference:,} and {self.num_tokens_candidate:,} tokens)",
        ]
        lines += [f"note:       {text}" for text in self.warnings]
        if self.most_changed:
            lines.append("most changed segments (reference -> candidate, nats):")
        lines += [
            f"  {s.nll_reference:8.4f} -> {s.nll_candidate:8.4f}  {s.context!r} {s.text!r}"
            for s in self.most_changed
        ]
        return "\n".join(lines)


class ScoredBytes(NamedTuple):
    """One run's scored tokens in reading order, each once, in bytes of all documents."""

    document_R: NDArray[np.int64]
    start_R: NDArray[np.int64]  # in the document
    stop_R: NDArray[np.int64]
    nll_R: NDArray[np.float64]
    window_R: NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Return bytes of all scored tokens."""
        return int((self.stop_R - self.start_R).sum())


def scored_bytes(run: Run) -> ScoredBytes:
    """Return a run's scored tokens as bytes; each token once, with the most context."""
    rows = RunText.of(run).row
    rows = rows[rows >= 0]
    tokens = run.tokens
    start_R = tokens.byte_start[rows].astype(np.int64)
    return ScoredBytes(
        document_R=tokens.document[rows].astype(np.int64),
        start_R=start_R,
        stop_R=start_R + tokens.num_bytes[rows],
        nll_R=tokens.nll[rows].astype(np.float64),
        window_R=tokens.window[rows].astype(np.int64),
    )


class Segments(NamedTuple):
    """The stretches of text between common cuts that both runs scored whole, finitely."""

    document_S: NDArray[np.int64]
    start_S: NDArray[np.int64]  # in the document
    num_bytes_S: NDArray[np.int64]
    reference_S: NDArray[np.float64]  # nats
    candidate_S: NDArray[np.float64]
    window_S: NDArray[np.int64]  # the reference's, of the segment's first token
    num_non_finite: int


def common_segments(reference: ScoredBytes, candidate: ScoredBytes) -> Segments:
    """Return the common segments of two runs. Raises EmptyScoreError where there is none."""
    base_D = _document_bases(reference, candidate)
    cuts = np.intersect1d(_boundaries(reference, base_D), _boundaries(candidate, base_D))
    num_segments = max(len(cuts) - 1, 0)
    lengths = np.diff(cuts)
    whole = lengths > 0
    sums, windows = [], []
    for side in (reference, candidate):
        segment_R = np.searchsorted(cuts, base_D[side.document_R] + side.start_R, "right") - 1
        # Tokens outside all cuts, and one without bytes at the very last cut, have no segment.
        inside = (segment_R >= 0) & (segment_R < num_segments)
        labels = segment_R[inside]
        num_bytes = (side.stop_R - side.start_R)[inside]
        scored = np.bincount(labels, weights=num_bytes, minlength=num_segments)
        nll_S = np.bincount(labels, weights=side.nll_R[inside], minlength=num_segments)
        sums.append(nll_S.astype(np.float64))
        whole &= scored == lengths
        first = np.zeros(num_segments, dtype=np.int64)
        first[labels[::-1]] = side.window_R[inside][::-1]
        windows.append(first)
    finite = np.isfinite(sums[0]) & np.isfinite(sums[1])
    kept = np.flatnonzero(whole & finite)
    if len(kept) == 0:
        raise EmptyScoreError(
            "expected bytes that both runs scored with a finite loss, got none: "
            "evaluate both over the whole text, with the protocol 'sliding' for example"
        )
    document_S = np.searchsorted(base_D, cuts[kept], "right") - 1
    return Segments(
        document_S=document_S,
        start_S=cuts[kept] - base_D[document_S],
        num_bytes_S=lengths[kept].astype(np.int64),
        reference_S=sums[0][kept],
        candidate_S=sums[1][kept],
        window_S=windows[0][kept],
        num_non_finite=int(np.count_nonzero(whole & ~finite)),
    )


def _document_bases(*sides: ScoredBytes) -> NDArray[np.int64]:
    """Return where each document begins on one line of bytes, one byte apart."""
    num_documents = 1 + max(int(side.document_R.max(initial=-1)) for side in sides)
    ends_D = np.zeros(num_documents, dtype=np.int64)
    for side in sides:
        np.maximum.at(ends_D, side.document_R, side.stop_R)
    return np.concatenate(([0], np.cumsum(ends_D + 1)[:-1]))[:num_documents]


def _boundaries(side: ScoredBytes, base_D: NDArray[np.int64]) -> NDArray[np.int64]:
    base_R = base_D[side.document_R]
    return np.concatenate((base_R + side.start_R, base_R + side.stop_R))

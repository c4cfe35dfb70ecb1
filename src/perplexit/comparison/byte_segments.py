"""Segments of a text between the token boundaries that two tokenizations share.

Shape suffixes: R = scored tokens of one run in reading order, S = segments that both runs scored
whole, D = documents.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText


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

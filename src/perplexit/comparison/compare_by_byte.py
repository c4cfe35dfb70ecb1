"""compare_bytes: two runs with different tokenizers over the same text, paired by bytes.

The text is cut where both tokenizations have a token boundary; between two cuts each run has a sum
of losses over the same bytes. Token perplexities of two tokenizers are never set side by side.

Shape suffixes: S = segments that both runs scored whole, C = clusters.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.byte_comparison import (
    ByteComparison,
    ChangedSegment,
    Segments,
    common_segments,
    scored_bytes,
)
from perplexit.comparison.pairing import opened
from perplexit.comparison.verdict_record import run_conditions, verdict_fields, with_ends
from perplexit.comparison.verdicts import margin_of
from perplexit.errors import FingerprintMismatchError
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import clusters_for, ratio_interval
from perplexit.metrics.likelihood import exp_or_inf
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText

CONTEXT_BYTES = 60
_BITS = 1 / math.log(2)  # bits per nat


def compare_bytes(
    reference: Run | str | Path,
    candidate: Run | str | Path,
    *,
    confidence: float = 0.95,
    noise_floor: float = 0.0,
    margin: float | str = 0.0,
    num_most_changed: int = 10,
) -> ByteComparison:
    """Compare a candidate with a reference over the bytes that both scored, paired by segment.

    Tokenizers, windows and engines may differ; the text must be the same. A token that several
    windows scored counts once, with the most context.

    noise_floor: nats per byte. margin: the change of the byte perplexity that does not matter, as
        a share (0.01) or a percentage ("1%").
    Raises FingerprintMismatchError for different texts or inputs without text, EmptyScoreError
    where no segment is common, RunError where a run is incomplete.
    """
    runs = [opened(reference), opened(candidate)]
    allowed = margin_of(*runs, noise_floor=noise_floor, margin=margin, per_byte=True)
    _require_same_text(*runs)
    texts = [scored_bytes(run) for run in runs]
    segments = common_segments(*texts)
    clusters = clusters_for(segments.document_S, segments.window_S)
    delta_S = segments.candidate_S - segments.reference_S

    def ratio(over_S: NDArray[Any], under_S: NDArray[Any]) -> Estimate:
        sums_C, counts_C = clusters.sums(over_S), clusters.sums(under_S)
        return ratio_interval(sums_C, counts_C, clusters.method, confidence)

    def bits_per_byte(nll_S: NDArray[Any]) -> Estimate:
        return ratio(nll_S, segments.num_bytes_S).clamped(lowest=0.0).scaled(_BITS)

    interval = ratio(delta_S, segments.num_bytes_S)
    relative = ratio(segments.candidate_S, segments.reference_S).clamped(lowest=0.0)
    num_bytes = int(segments.num_bytes_S.sum())
    return ByteComparison(
        **verdict_fields(interval, allowed),
        **with_ends("bits_per_byte_reference", bits_per_byte(segments.reference_S)),
        **with_ends("bits_per_byte_candidate", bits_per_byte(segments.candidate_S)),
        **with_ends("bits_per_byte_difference", interval.scaled(_BITS)),
        **with_ends("log_difference", interval),
        **with_ends("byte_ratio", interval.mapped(exp_or_inf)),
        **with_ends("bits_per_byte_ratio", relative),
        num_bytes=num_bytes,
        num_segments=len(delta_S),
        num_tokens_reference=len(texts[0].nll_R),
        num_tokens_candidate=len(texts[1].nll_R),
        num_unaligned_bytes_reference=texts[0].num_bytes - num_bytes,
        num_unaligned_bytes_candidate=texts[1].num_bytes - num_bytes,
        text_fingerprint=runs[0].text_fingerprint,
        same_tokenizer=runs[0].tokenizer_fingerprint == runs[1].tokenizer_fingerprint,
        reference=_conditions(runs[0]),
        candidate=_conditions(runs[1]),
        most_changed=_most_changed(runs[0], segments, delta_S, num_most_changed),
        reasons={} if interval.reason is None else {"byte_ratio_low": interval.reason},
        warnings=_warnings(runs, segments),
    )


def _require_same_text(reference: Run, candidate: Run) -> None:
    ours, theirs = reference.text_fingerprint, candidate.text_fingerprint
    if ours != theirs:
        raise FingerprintMismatchError(
            f"expected two runs over the same text, got the texts {ours[:12]}… and {theirs[:12]}…; "
            "`perplexit explain` shows where they differ. Prepare one corpus for both tokenizers, "
            "both with a protocol that joins documents or both with one that does not"
        )
    for run in (reference, candidate):
        if run.tokens.token_bytes is None:
            raise FingerprintMismatchError(
                f"expected runs whose tokens stand for bytes, but the input of {run.folder or run} "
                "holds ids without text; prepare the text itself"
            )


def _most_changed(
    run: Run, segments: Segments, delta_S: NDArray[np.float64], limit: int
) -> tuple[ChangedSegment, ...]:
    order = np.argsort(-np.abs(delta_S), kind="stable")[:limit]
    text = RunText.of(run)
    base_D = text.document_byte_starts
    changed = []
    for index in order.tolist():
        document, start = int(segments.document_S[index]), int(segments.start_S[index])
        at = int(base_D[document]) + start
        before = max(int(base_D[document]), at - CONTEXT_BYTES)
        changed.append(
            ChangedSegment(
                document=document,
                byte_start=start,
                text=_shown(text.text_bytes[at : at + int(segments.num_bytes_S[index])]),
                context=_shown(text.text_bytes[before:at]),
                nll_reference=float(segments.reference_S[index]),
                nll_candidate=float(segments.candidate_S[index]),
                delta=float(delta_S[index]),
            )
        )
    return tuple(changed)


def _warnings(runs: list[Run], segments: Segments) -> tuple[str, ...]:
    reference, candidate = runs
    if reference.tokenizer_fingerprint != candidate.tokenizer_fingerprint:
        warnings = [
            "the runs' perplexities per token count different tokens and cannot be compared; bits "
            "per byte and this ratio can"
        ]
    else:
        warnings = [
            "the tokenizers are the same but the inputs differ (windows, BOS or scored tokens): "
            "the difference is not the models' alone; `perplexit explain` names it"
        ]
    if segments.num_non_finite:
        warnings.append(
            f"{segments.num_non_finite} segments with a loss that is not finite are left out"
        )
    return tuple(warnings)


def _conditions(run: Run) -> dict[str, Any]:
    return run_conditions(run) | {
        "tokenizer_fingerprint": run.tokenizer_fingerprint,
        "bits_per_byte": run.bits_per_byte,
    }


def _shown(data: bytes) -> str:
    return data.replace(b"\0", b"").decode("utf-8", errors="replace")

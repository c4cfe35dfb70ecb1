"""The rows behind the report's charts, from stored tokens alone.

Shape suffix: R = rows (scored tokens); B = buckets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.metrics.intervals import clusters_for, mean_interval
from perplexit.metrics.likelihood import loss_by_position
from perplexit.report.subject import Subject
from perplexit.runs.run_tokens import RunTokens

NUM_POINTS = 60
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
SMALLEST_BUCKET = 10  # fewer tokens than this say nothing about a share

Row = dict[str, str | float | int | None]


def exceedance(values_R: NDArray[np.floating]) -> list[tuple[float, float]]:
    """(x, share of all tokens whose value lies above x), at points spaced evenly in log x.

    Values of zero or below count in the denominator only.
    """
    finite = values_R[np.isfinite(values_R)].astype(np.float64)
    positive = np.sort(finite[finite > 0])
    if len(positive) == 0:
        return []
    lowest = max(float(np.quantile(positive, 0.02)), float(positive[-1]) * 1e-6)
    points = np.geomspace(lowest, positive[-1], NUM_POINTS)
    points[-1] = np.nextafter(positive[-1], 0)  # the largest itself lies above the last point
    above = len(positive) - np.searchsorted(positive, points, side="right")
    shares = above / len(finite)
    return [(float(x), float(s)) for x, s in zip(points, shares, strict=True) if s > 0]


def change_rows(subject: Subject) -> list[Row]:
    """How much losses change: a curve a candidate and direction."""
    rows: list[Row] = []
    for label, delta_R in zip(subject.labels[1:], subject.deltas, strict=True):
        for direction, sign in (("worse", 1.0), ("better", -1.0)):
            rows += [
                {"run": label, "direction": direction, "change": x, "share": share}
                for x, share in exceedance(sign * delta_R)
            ]
    return rows


def kl_rows(subject: Subject) -> list[Row]:
    """How far distributions moved, for the candidates that were scored with a reference."""
    return [
        {"run": label, "kl": x, "share": share}
        for label, run, _ in subject.candidates
        for kl_R in [column_of(run.tokens, "kl")]
        if kl_R is not None
        for x, share in exceedance(kl_R)
    ]


def loss_rows(subject: Subject) -> list[Row]:
    """How losses are spread, a curve a run."""
    return [
        {"run": label, "loss": x, "share": share}
        for label, run in zip(subject.labels, subject.runs, strict=True)
        for x, share in exceedance(run.tokens.nll)
    ]


def position_rows(subject: Subject) -> list[Row]:
    """Mean loss by the target's position in its window, a row a run and bucket."""
    rows: list[Row] = []
    for label, run in zip(subject.labels, subject.runs, strict=True):
        finite = np.isfinite(run.tokens.nll)
        for bucket in loss_by_position(run.tokens.position[finite], run.tokens.nll[finite]):
            if bucket.mean_nll is not None:
                rows.append(
                    {
                        "run": label,
                        "from": bucket.start,
                        "to": bucket.stop - 1,
                        "middle": (bucket.start + bucket.stop - 1) / 2,
                        "loss": bucket.mean_nll,
                        "tokens": bucket.num_tokens,
                    }
                )
    return rows


@dataclass(frozen=True, slots=True)
class Agreement:
    """Per row, whether both models have the same first choice, and how sure the reference was."""

    same_R: NDArray[np.bool_]
    confidence_R: NDArray[np.float64]


def agreement_of(reference: RunTokens, candidate: RunTokens) -> Agreement | None:
    """The first choices compared; None where the alternatives were not recorded."""
    if reference.top_logprobs is None or reference.top_ids is None:
        return None
    confidence_R = np.exp(reference.top_logprobs[:, 0].astype(np.float64))
    same_R = column_of(candidate, "same_top1")
    if same_R is None:
        if candidate.top_ids is None:
            return None
        same_R = reference.top_ids[:, 0] == candidate.top_ids[:, 0]
    return Agreement(same_R.astype(np.bool_), confidence_R)


def agreement_rows(subject: Subject) -> list[Row]:
    """The share of tokens with the same first choice, by the reference's confidence in its own."""
    rows: list[Row] = []
    tokens = subject.reference.tokens
    for label, run, _ in subject.candidates:
        agreement = agreement_of(tokens, run.tokens)
        if agreement is None:
            continue
        bucket_R = np.digitize(agreement.confidence_R, CONFIDENCE_EDGES[1:-1])
        for bucket in range(len(CONFIDENCE_EDGES) - 1):
            inside = np.flatnonzero(bucket_R == bucket)
            if len(inside) < SMALLEST_BUCKET:
                continue
            clusters = clusters_for(tokens.document[inside], tokens.window[inside])
            share = mean_interval(
                agreement.same_R[inside].astype(np.float64), clusters, subject.confidence
            )
            low, high = CONFIDENCE_EDGES[bucket], CONFIDENCE_EDGES[bucket + 1]
            rows.append(
                {
                    "run": label,
                    "confidence": f"{100 * low:g}{DASH}{100 * high:g} %",
                    "share": share.value,
                    "low": None if share.low is None else max(share.low, 0.0),
                    "high": None if share.high is None else min(share.high, 1.0),
                    "tokens": len(inside),
                }
            )
    return rows


DASH = "–"


def column_of(tokens: RunTokens, name: str) -> NDArray[Any] | None:
    """A column that only runs scored with a reference have; None in the others."""
    values = getattr(tokens, name, None)
    return None if values is None else np.asarray(values)

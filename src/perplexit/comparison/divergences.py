"""How far a candidate's distributions are from the reference's, summed up; and where.

Shape suffix: M = tokens that both runs scored with a finite loss, in window order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.pairing import Pairs
from perplexit.metrics.bounded_intervals import positive_mean, share_interval
from perplexit.metrics.distribution import (
    CONFIDENCE_EDGES,
    Distribution,
    IntervalOf,
    distribution,
    mean_by,
)
from perplexit.metrics.intervals import mean_interval
from perplexit.runs.measurement import measurement_differences
from perplexit.runs.run import Run
from perplexit.runs.run_tokens import RunTokens
from perplexit.token_columns import TOKEN_COLUMNS, Needs, columns_that_need

FREQUENCY_EDGES = (1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 1000.0, float(2**53))
NUM_POSITION_BUCKETS = 8


@dataclass(frozen=True, slots=True)
class Divergences:
    """The distributions of the divergence columns over the common tokens, each with its interval.

    columns:  kl (reference ‖ candidate), reverse_kl, js in nats; same_top1 and top_k_agreement as
              shares; delta_p as a change of the target's probability.
              kl_high (where only a part of the reference is known: kl, reverse_kl and js are then
              lower bounds, and this is the upper one of kl).
    floor:    (mean, largest) KL of the reference with itself, as it was stored; None in step.
    num_below_floor: tokens whose KL is not above the floor's mean: too small to tell from storage.
    """

    columns: Mapping[str, Distribution]
    floor: tuple[float, float] | None
    num_below_floor: int | None = None


def interval_for(name: str) -> IntervalOf:
    """Return how the mean of a divergence column is estimated, by the values that are possible."""
    column = TOKEN_COLUMNS[name]
    if column.unit == "share":
        return share_interval
    mean_of = positive_mean if column.lowest == 0 else mean_interval
    return lambda *given: mean_of(*given).clamped(column.lowest, column.highest)


def divergences_of(
    reference: Run, candidate: Run, pairs: Pairs, confidence: float
) -> tuple[Divergences | None, list[str]]:
    """Return (the divergences of a candidate scored against this very reference, warnings)."""
    if candidate.reference is None:
        return None, []
    why_not = unlike_reference(reference, candidate)
    if why_not is not None:
        return None, [why_not]
    columns, warnings = {}, []
    for name in columns_that_need(Needs.REFERENCE):
        column = _column(candidate.tokens, name, pairs)
        if column is None or name == "reference_top_p":
            continue
        infinite = int(np.count_nonzero(~np.isfinite(column)))
        if infinite:
            warnings.append(f"{name} is left out: it is not finite for {infinite} tokens")
        else:
            columns[name] = distribution(
                column.astype(np.float64),
                pairs.clusters,
                confidence,
                interval_of=interval_for(name),
            )
    found = Divergences(columns, _floor(reference, candidate))
    if found.floor is None or "kl" not in columns:
        return found, warnings
    kl_M = np.asarray(_column(candidate.tokens, "kl", pairs))
    if 0 < columns["kl"].mean.value <= found.floor[0]:
        warnings.append(
            f"the mean KL ({columns['kl'].mean.value:.2g}) is not above what the stored reference "
            f"has with itself ({found.floor[0]:.2g} nats per token): it says nothing"
        )
    return replace(found, num_below_floor=int((kl_M <= found.floor[0]).sum())), warnings


def held_against(reference: Run, candidate: Run) -> bool:
    """Tell whether the candidate's divergence columns were measured from this reference run."""
    return candidate.reference is not None and unlike_reference(reference, candidate) is None


def unlike_reference(reference: Run, candidate: Run) -> str | None:
    """Return why the candidate's divergences do not belong to this reference; None where they do.

    Both the measurement and the input must be the reference run's own: equal weights are not
    enough, since another precision, mode or attention gives other distributions.
    """
    recorded = candidate.reference or {}
    against = "the candidate's KL columns were measured against another"
    left_out = "and are left out; evaluate the candidate with --reference and this reference run"
    if recorded.get("weights_fingerprint") != reference.model.get("weights_fingerprint"):
        return f"{against} model ({recorded.get('address')}) {left_out}"
    fingerprint = recorded.get("measurement_fingerprint")
    if fingerprint is None:
        return (
            "the candidate's KL columns come from an older Perplexit, which did not record which "
            f"measurement of {recorded.get('address')} they were made against, {left_out}"
        )
    if fingerprint != reference.measurement_fingerprint:
        differences = measurement_differences(
            recorded.get("measurement") or {}, reference.measurement
        )
        return (
            f"{against} measurement of {recorded.get('address')}, which differs from this "
            f"reference in {', '.join(differences) or 'its fingerprint'}, {left_out}"
        )
    if recorded.get("input_fingerprint") != reference.input_fingerprint:
        return f"{against} input {left_out}"
    return None


def _floor(reference: Run, candidate: Run) -> tuple[float, float] | None:
    """Return of the stored states, or of the file that the candidate was held against."""
    for record in (candidate.reference or {}, reference.saved_reference or {}):
        if "self_kl_max" in record:
            return record["self_kl_mean"], record["self_kl_max"]
    return None


def buckets_of(
    candidate: Run, pairs: Pairs, divergences: Divergences | None
) -> dict[str, list[dict[str, Any]]]:
    """Mean change of the loss (and mean KL, agreement) by position, frequency and confidence.

    frequency: how often the token's id is scored in this input; confidence: the reference's
    probability of its most likely token. KL, agreement and confidence are there where
    `divergences` has them: what a comparison left out has no buckets either.
    """
    tokens = pairs.tokens
    position_M = tokens.position[pairs.rows].astype(np.float64)
    _, inverse_M, counts = np.unique(
        tokens.token_id[pairs.rows], return_inverse=True, return_counts=True
    )
    keys: dict[str, tuple[NDArray[np.float64], tuple[float, ...]]] = {
        "position": (position_M, _position_edges(position_M)),
        "frequency": (counts[inverse_M].astype(np.float64), FREQUENCY_EDGES),
    }
    values = {"mean_nll_difference": pairs.delta}
    if divergences is not None:
        top_p = _column(candidate.tokens, "reference_top_p", pairs)
        if top_p is not None:
            keys["confidence"] = (top_p.astype(np.float64), CONFIDENCE_EDGES)
        for label, name in (("mean_kl", "kl"), ("top1_agreement", "same_top1")):
            column = _column(candidate.tokens, name, pairs)
            if column is not None and name in divergences.columns:
                values[label] = column.astype(np.float64)
    return {name: _rows(values, key_M, edges) for name, (key_M, edges) in keys.items()}


def _rows(
    values: Mapping[str, NDArray[np.float64]], key_M: NDArray[np.float64], edges: tuple[float, ...]
) -> list[dict[str, Any]]:
    tables = {label: mean_by(column, key_M, edges) for label, column in values.items()}
    first = next(iter(tables.values()))
    return [
        {
            "low": bucket.low,
            "high": bucket.high,
            "num_tokens": bucket.num_tokens,
            **{label: table[index].mean for label, table in tables.items()},
        }
        for index, bucket in enumerate(first)
        if bucket.num_tokens
    ]


def _position_edges(position_M: NDArray[np.float64]) -> tuple[float, ...]:
    stop = float(position_M.max()) + 1
    edges = np.unique(np.floor(np.linspace(0, stop, NUM_POSITION_BUCKETS + 1)))
    return tuple(edges.tolist())


def _column(tokens: RunTokens, name: str, pairs: Pairs) -> NDArray[Any] | None:
    column = getattr(tokens, name)
    return None if column is None else np.asarray(column[pairs.rows])

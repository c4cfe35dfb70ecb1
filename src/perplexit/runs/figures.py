"""The reported figures, computed from per-token results alone: no model, no engine, NumPy only.

`evaluate` records what this module computes, and `runs verify` computes it again from
`tokens.parquet`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError
from perplexit.inputs.protocols import protocol_perplexity
from perplexit.metrics import likelihood
from perplexit.metrics.intervals import clusters_for, mean_interval
from perplexit.metrics.totals import NllTotals, finite_mask
from perplexit.runs.run_tokens import RunTokens

NO_TEXT = "the input holds ids without text (it was imported as plain id lines)"


def figures_of(
    tokens: RunTokens,
    *,
    confidence: float,
    on_non_finite: str,
    protocol: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of `run.json` that follow from the scored tokens, `reasons` for the null ones.

    protocol: the input spec's entry; where its tool averages in another way, that tool's figure is
        reported as `protocol_perplexity`.
    Raises NonFiniteError under the policy "error", EmptyScoreError where nothing finite is left.
    """
    keep, num_non_finite = finite_mask(
        tokens.nll,
        "count" if on_non_finite == "count" else "error",
        window_M=tokens.window,
        position_M=tokens.position,
        token_id_M=tokens.token_id,
    )
    scored = tokens if num_non_finite == 0 else rows_of(tokens, keep)
    if len(scored) == 0:
        raise EmptyScoreError(
            f"expected at least one scored token, got 0 of {len(tokens)} with a finite loss; "
            "score in a wider dtype, or look at the model"
        )
    has_text = scored.token_bytes is not None
    totals = NllTotals.of(scored.nll, scored.num_bytes, scored.num_words)
    figures = _Figures()
    figures.set("perplexity", likelihood.perplexity(totals))
    figures.record |= {
        "nll_sum": totals.nll_sum,
        "num_tokens": totals.num_tokens,
        "num_bytes": totals.num_bytes if has_text else None,
        "num_words": totals.num_words if has_text else None,
        "num_non_finite": num_non_finite,
    }
    _add_intervals(figures, scored, totals, confidence, has_text)
    _add_text_units(figures, totals, has_text)
    _add_protocol_perplexity(figures, scored, protocol)
    _add_tables(figures, scored)
    return figures.record


class _Figures:
    """A record in the making: a figure that is not finite becomes null with its reason."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"reasons": {}}

    def set(self, name: str, value: float | None, reason: str | None = None) -> None:
        finite, why = likelihood.json_figure(name, value)
        self.record[name] = finite
        if why is not None:
            self.record["reasons"][name] = reason or why


def _add_intervals(
    figures: _Figures, scored: RunTokens, totals: NllTotals, confidence: float, has_text: bool
) -> None:
    interval = mean_interval(scored.nll, clusters_for(scored.document, scored.window), confidence)
    figures.record |= {
        "interval_method": interval.method,
        "num_clusters": interval.num_clusters,
        "confidence": confidence,
    }
    bits_per_nat_of_mean = (
        totals.num_tokens / totals.num_bytes / math.log(2)
        if has_text and totals.num_bytes
        else None
    )
    for side, bound in (("low", interval.low), ("high", interval.high)):
        ppl = None if bound is None else likelihood.exp_or_inf(bound)
        figures.set(f"perplexity_{side}", ppl, interval.reason)
        bits = (
            None if bound is None or bits_per_nat_of_mean is None else bound * bits_per_nat_of_mean
        )
        figures.set(f"bits_per_byte_{side}", bits, interval.reason if has_text else NO_TEXT)


def _add_text_units(figures: _Figures, totals: NllTotals, has_text: bool) -> None:
    units: Mapping[str, Callable[[NllTotals], float]] = {
        "bits_per_byte": likelihood.bits_per_byte,
        "byte_perplexity": likelihood.byte_perplexity,
        "word_perplexity": likelihood.word_perplexity,
    }
    for name, metric in units.items():
        try:
            figures.set(name, metric(totals), None if has_text else NO_TEXT)
        except EmptyScoreError as error:
            figures.set(name, None, str(error) if has_text else NO_TEXT)


def _add_protocol_perplexity(
    figures: _Figures, scored: RunTokens, protocol: Mapping[str, Any]
) -> None:
    figures.record["protocol_perplexity"] = None
    if protocol.get("aggregate", "tokens") != "tokens":
        value = protocol_perplexity(protocol, scored.nll, scored.window)
        figures.set("protocol_perplexity", value)


def _add_tables(figures: _Figures, scored: RunTokens) -> None:
    table = likelihood.per_domain(scored)
    figures.record["domains"] = []
    if table is not None:
        figures.set("macro_average_perplexity", table.macro_average_perplexity)
        for row in table.rows:
            units = _Figures()
            units.set("perplexity", row.perplexity)
            _add_text_units(units, row.totals, scored.token_bytes is not None)
            units.record.pop("reasons")
            figures.record["domains"].append(
                {"domain": row.name, **asdict(row.totals), **units.record}
            )
    figures.record["loss_by_position"] = [
        asdict(bucket) for bucket in likelihood.loss_by_position(scored.position, scored.nll)
    ]


def rows_of(tokens: RunTokens, rows: NDArray[np.bool_] | NDArray[np.int64]) -> RunTokens:
    """The chosen rows of every column."""
    flat = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    apart = ("domains", "token_bytes", "partial")
    columns = [f.name for f in fields(tokens) if f.name not in apart]
    chosen = {
        name: getattr(tokens, name)[flat] for name in columns if getattr(tokens, name) is not None
    }
    if tokens.token_bytes is not None:
        chosen["token_bytes"] = tokens.token_bytes.take(flat)
    partial = {name: column.take(np.asarray(flat)) for name, column in tokens.partial.items()}
    return replace(tokens, **chosen, partial=partial)

"""The reported figures, computed from per-token results alone: no model, no engine, NumPy only.

`evaluate` records what this module computes, and `runs verify` computes it again from
`tokens.parquet`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from perplexit.errors import EmptyScoreError, PerplexitError
from perplexit.inputs.protocols import protocol_perplexity, protocol_sums
from perplexit.metrics import likelihood
from perplexit.metrics.bounded_intervals import averaged, positive_interval
from perplexit.metrics.estimate import Estimate, counted
from perplexit.metrics.intervals import (
    MIN_CLUSTERS,
    Clusters,
    clusters_for,
    clusters_within,
    ratio_interval,
)
from perplexit.metrics.totals import NllTotals, finite_mask
from perplexit.runs.run import Run
from perplexit.runs.run_tokens import RunTokens

DRIFT = 3.0  # variance of means of real text over that of independent tokens: docs/coverage.md
NO_TEXT = "the input holds ids without text (it was imported as plain id lines)"


def figures_of(
    tokens: RunTokens,
    *,
    confidence: float,
    on_non_finite: str,
    spec: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of `run.json` that follow from the scored tokens.

    spec: of the input. Where the tool of its protocol averages in another way, the tool's figure
        is reported as `protocol_perplexity`. Where it counts documents without a token (lm-eval),
        the words and bytes are those that the tool divides by.
    `reasons` says why a figure is null.
    Raises NonFiniteError under the policy "error", EmptyScoreError where nothing finite is left.
    """
    keep, num_non_finite = finite_mask(
        tokens.nll,
        "count" if on_non_finite == "count" else "error",
        window_M=tokens.window,
        position_M=tokens.position,
        token_id_M=tokens.token_id,
    )
    scored = tokens if num_non_finite == 0 else tokens.take(keep)
    if len(scored) == 0:
        raise EmptyScoreError(
            f"expected at least one scored token, got 0 of {len(tokens)} with a finite loss; "
            "score in a wider dtype, or look at the model"
        )
    protocol = spec["protocol"]
    beyond = spec.get("corpus", {}).get("without_tokens", {"num_bytes": 0, "num_words": 0})
    totals = NllTotals.of(scored.nll, scored.num_bytes, scored.num_words)
    totals += NllTotals(num_bytes=beyond["num_bytes"], num_words=beyond["num_words"])
    clusters = clusters_for(scored.document, scored.window)
    has_text = scored.token_bytes is not None
    figures = _Figures(reason=_too_little_text(scored, clusters, protocol))
    figures.record |= {
        "nll_sum": totals.nll_sum,
        "num_tokens": totals.num_tokens,
        "num_bytes": totals.num_bytes if has_text else None,
        "num_words": totals.num_words if has_text else None,
        "num_non_finite": num_non_finite,
        "interval_method": clusters.method,
        "num_clusters": clusters.num_clusters,
        "confidence": confidence,
    }
    figures.set_units(scored, totals, clusters, confidence)
    _add_protocol_perplexity(figures, scored, clusters, confidence, protocol)
    _add_domains(figures, scored, clusters, confidence)
    figures.record["loss_by_position"] = [
        asdict(bucket) for bucket in likelihood.loss_by_position(scored.position, scored.nll)
    ]
    return figures.record


class _Figures:
    """A record in the making: a figure that is not finite becomes null with its reason.

    reason: why no figure of these tokens has an interval; None where they can have one.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.record: dict[str, Any] = {"reasons": {}}
        self._reason = reason

    def set(self, name: str, found: Estimate | str) -> None:
        """Enter a figure as `name`, `name_low` and `name_high`; a sentence says why it has none."""
        estimate = Estimate(math.nan, reason=found) if isinstance(found, str) else found
        missing = found if isinstance(found, str) else None
        why_no_end = missing or self._reason or estimate.reason
        self._set(name, estimate.value, missing)
        self._set(f"{name}_low", estimate.low, why_no_end)
        self._set(f"{name}_high", estimate.high, why_no_end)

    def set_units(
        self, tokens: RunTokens, totals: NllTotals, clusters: Clusters, confidence: float
    ) -> None:
        """Enter the figures for each token, byte and word."""
        estimates = likelihood.unit_estimates(
            tokens.nll,
            tokens.num_bytes,
            tokens.num_words,
            totals=totals,
            clusters=clusters,
            confidence=confidence,
        )
        for name, found in estimates.items():
            without_text = tokens.token_bytes is None and name != "perplexity"
            self.set(name, NO_TEXT if without_text else found)

    def _set(self, name: str, value: float | None, reason: str | None) -> None:
        finite, why = likelihood.json_figure(name, value)
        self.record[name] = finite
        if why is not None:
            self.record["reasons"][name] = reason or why


def _too_little_text(
    scored: RunTokens, clusters: Clusters, protocol: Mapping[str, Any]
) -> str | None:
    """Return the sentence for a run whose figures cannot have an interval, with how much would do.

    Enough are four windows, and as many tokens as bring the perplexity to ± 10 % if their losses
    vary as these do, times the drift of real text (docs/coverage.md).
    """
    if clusters.num_clusters >= MIN_CLUSTERS:
        return None
    num_tokens, num_windows = len(scored), len(np.unique(scored.window))
    spread = float(scored.nll.astype(np.float64).std())
    enough = DRIFT * (1.96 * spread / math.log(1.1)) ** 2
    length = protocol.get("max_length")
    if length is None:
        enough = max(enough, MIN_CLUSTERS * num_tokens / num_windows)
    else:
        stride = protocol.get("stride")
        enough = max(enough, length + (MIN_CLUSTERS - 1) * (length if stride is None else stride))
    digits = 10 ** max(0, math.floor(math.log10(enough)) - 1)
    return (
        f"too few tokens for an interval: {counted(num_tokens, 'token')} in "
        f"{counted(num_windows, 'window')}, and at least {MIN_CLUSTERS} "
        f"windows are needed; about {math.ceil(enough / digits) * digits:,} tokens would give the "
        "perplexity to about ± 10 %"
    )


def _add_protocol_perplexity(
    figures: _Figures,
    scored: RunTokens,
    clusters: Clusters,
    confidence: float,
    protocol: Mapping[str, Any],
) -> None:
    aggregate = protocol.get("aggregate", "tokens")
    if aggregate == "tokens":
        ends = ("", "_low", "_high")
        figures.record |= {f"protocol_perplexity{end}": None for end in ends}
        return
    sum_W, weight_W = protocol_sums(protocol, scored.nll, scored.window)
    labels_W = clusters.labels[np.unique(scored.window, return_index=True)[1]]
    of_windows = Clusters(labels_W, clusters.method, clusters.num_clusters)
    sums_C, weights_C = of_windows.sums(sum_W), of_windows.sums(weight_W)
    value = protocol_perplexity(protocol, scored.nll, scored.window)
    if not math.isfinite(value):
        found = Estimate(value, reason="protocol_perplexity has no interval: it overflows float64")
    elif aggregate == "window-perplexities":
        found = positive_interval(sums_C, weights_C, clusters.method, confidence)
        plain = ratio_interval(sums_C, weights_C, clusters.method, confidence)
        found = replace(found, low=plain.low).clamped(1.0)  # the wider end on either side
    else:
        nats = ratio_interval(sums_C, weights_C, clusters.method, confidence)
        found = nats.clamped(lowest=0.0).mapped(likelihood.exp_or_inf)
    figures.set("protocol_perplexity", replace(found, value=value))


def _add_domains(
    figures: _Figures, scored: RunTokens, clusters: Clusters, confidence: float
) -> None:
    """Return a row for each domain, and the figure that gives every domain the same weight."""
    figures.record["domains"] = []
    groups = {} if not scored.domains else likelihood.group_rows(scored.domain)
    groups.pop(-1, None)
    totals, means = [], []
    for code, rows in groups.items():
        part = scored.take(rows)
        own = clusters_within(clusters, rows, scored.window)
        totals.append(NllTotals.of(part.nll, part.num_bytes, part.num_words))
        means.append(likelihood.mean_loss(part.nll, own, confidence))
        units = _Figures()
        units.set_units(part, totals[-1], own, confidence)
        figures.record["domains"].append(
            {
                "domain": scored.domains[code],
                **asdict(totals[-1]),
                **units.record,
                "interval_method": own.method,
                "num_clusters": own.num_clusters,
            }
        )
    if groups:
        macro = averaged(means, confidence).clamped(lowest=0.0).mapped(likelihood.exp_or_inf)
        value = likelihood.macro_average_perplexity(totals)
        figures.set("macro_average_perplexity", replace(macro, value=value))


def verify_run(folder: str | Path) -> list[str]:
    """Return what is wrong with a stored run, one sentence each; empty where it is sound.

    The token table must be the one that was recorded (SHA-256), and every figure in `run.json`
    must follow from it: all are computed again, without a model.
    Raises RunError where there is no run to check.
    """
    run = Run.open(folder)
    if run.status != "complete":
        return [f"the run is {run.status}; go on with `perplexit eval` and the same --run"]
    damage = run.damage()
    if damage is not None:
        return [f"{damage}; evaluate again with the same --run"]
    if run.measurement_fingerprint != run.identified().measurement_fingerprint:
        return ["measurement_fingerprint is not that of the conditions that are recorded"]
    try:
        figures = figures_of(
            run.tokens,
            confidence=run.confidence,
            on_non_finite=run.on_non_finite,
            spec=run.input_spec,
        )
    except PerplexitError as error:
        return [str(error)]
    recorded = run.to_json()
    computed = Run.from_json(recorded | figures).to_json()
    if run.schema_version == 1:
        recorded = _as_now(recorded, computed)
    return list(_differences(recorded, computed))


def _as_now(recorded: dict[str, Any], computed: dict[str, Any]) -> dict[str, Any]:
    """Return a record of version 1 with what it lacks, or measured in another way, as it is now.

    Version 1 scaled the interval of bits per byte from that of the loss, gave two and three
    clusters an interval, and domains and the other figures none.
    """
    new = {name for name in recorded if name.endswith(("_low", "_high"))} | {"reasons"}
    if recorded["interval_method"] is not None and recorded["num_clusters"] >= MIN_CLUSTERS:
        new -= {"perplexity_low", "perplexity_high"}
    domains = [
        now | then for now, then in zip(computed["domains"], recorded["domains"], strict=False)
    ]
    if len(domains) != len(recorded["domains"]):
        domains = recorded["domains"]
    return recorded | {name: computed[name] for name in new} | {"domains": domains}


def _differences(recorded: dict[str, Any], computed: dict[str, Any]) -> list[str]:
    return [
        f"{name}: recorded {recorded[name]!r}, but the tokens give {computed[name]!r}"
        for name in recorded
        if not _same(recorded[name], computed[name])
    ]


def _same(a: Any, b: Any) -> bool:
    """Return Equal, floats to the last few bits (another platform's exp may differ there)."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)

"""compare: two runs over the same scored tokens → a paired ratio, its interval and a verdict.

Shape suffix: M = tokens that both runs scored with a finite loss, in window order.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.compared_tokens import compared_tokens
from perplexit.comparison.divergences import buckets_of, divergences_of
from perplexit.comparison.flips import CONTEXT_TOKENS, first_choices, flips_of, text_around
from perplexit.comparison.pairing import Pairs, opened, paired, require_same_input
from perplexit.comparison.token_comparison import ChangedToken, Comparison, DomainRatio
from perplexit.comparison.verdict_record import run_conditions, verdict_fields, with_ends
from perplexit.comparison.verdicts import margin_of, verdict_of
from perplexit.declared_options import check_numbers
from perplexit.metrics.bootstrap import bootstrap_check
from perplexit.metrics.intervals import clusters_within, mean_interval, paired_interval
from perplexit.metrics.likelihood import exp_or_inf, json_figure, mean_nll
from perplexit.metrics.totals import NllTotals
from perplexit.runs.run import Run


def compare(
    reference: Run | str | Path,
    candidate: Run | str | Path,
    *,
    confidence: float = 0.95,
    noise_floor: float = 0.0,
    margin: float | str = 0.0,
    num_most_changed: int = 10,
) -> Comparison:
    """Compare a candidate with a reference token by token. Either may be a run's folder.

    noise_floor: nats per token within which two runs of one model are known to differ; what a run
        measured of itself (`eval --measure-noise-floor`) counts too, and the largest decides.
    margin: the change of the perplexity that does not matter, as a share (0.01) or a percentage
        ("1%"): within ± log(1.01) of no difference two runs are equivalent.
    Raises FingerprintMismatchError, which says what differs, where the two runs did not score the
    same prepared input; RunError where a run is incomplete; EmptyScoreError without common tokens.
    """
    check_numbers(num_most_changed=num_most_changed)
    reference_run, candidate_run = opened(reference), opened(candidate)
    allowed = margin_of(
        reference_run, candidate_run, noise_floor=noise_floor, margin=margin, per_byte=False
    )
    require_same_input(reference_run, candidate_run)
    pairs = paired(reference_run.tokens, candidate_run.tokens)
    interval = paired_interval(pairs.reference, pairs.candidate, pairs.clusters, confidence)
    delta_M = pairs.delta
    counts_C = np.bincount(pairs.clusters.labels, minlength=pairs.clusters.num_clusters)
    absolute = mean_interval(np.abs(delta_M), pairs.clusters, confidence).clamped(lowest=0)
    divergences, warnings = divergences_of(reference_run, candidate_run, pairs, confidence)
    choices = first_choices(reference_run, candidate_run, pairs)
    flips = flips_of(
        reference_run, candidate_run, pairs, choices, limit=num_most_changed, confidence=confidence
    )
    reasons = {} if interval.reason is None else {"ppl_ratio_low": interval.reason}
    if pairs.num_unpaired:
        left_out = f"{pairs.num_unpaired} tokens with a loss that is not finite in a run"
        warnings.insert(0, f"{left_out} are left out")
    return Comparison(
        **verdict_fields(interval, allowed),
        perplexity_reference=_perplexity(pairs.reference, "perplexity_reference", reasons),
        perplexity_candidate=_perplexity(pairs.candidate, "perplexity_candidate", reasons),
        **with_ends("log_perplexity_difference", interval),
        **with_ends("ppl_ratio", interval.mapped(exp_or_inf)),
        num_tokens=len(delta_M),
        num_unpaired=pairs.num_unpaired,
        max_abs_nll_difference=float(np.abs(delta_M).max()),
        **with_ends("mean_abs_nll_difference", absolute),
        bootstrap=bootstrap_check(pairs.clusters.sums(delta_M), counts_C, interval),
        input_fingerprint=reference_run.input_fingerprint,
        reference=run_conditions(reference_run),
        candidate=run_conditions(candidate_run),
        domains=_domain_ratios(pairs, confidence, allowed.nats),
        most_changed=_most_changed(pairs, delta_M, num_most_changed),
        flips=flips,
        divergences=divergences,
        buckets=buckets_of(candidate_run, pairs, divergences),
        reasons=reasons,
        warnings=tuple(warnings),
        tokens=compared_tokens(
            candidate_run, pairs, divergences=divergences, choices=choices, confidence=confidence
        ),
    )


def _domain_ratios(pairs: Pairs, confidence: float, margin: float) -> tuple[DomainRatio, ...]:
    domain_M = pairs.tokens.domain[pairs.rows]
    ratios = []
    for code in np.unique(domain_M[domain_M >= 0]).tolist():
        inside = np.flatnonzero(domain_M == code)
        clusters = clusters_within(pairs.clusters, inside, pairs.tokens.window[pairs.rows])
        interval = paired_interval(
            pairs.reference[inside], pairs.candidate[inside], clusters, confidence
        )
        ratios.append(
            DomainRatio(
                domain=pairs.tokens.domains[code],
                num_tokens=len(inside),
                **with_ends("ppl_ratio", interval.mapped(exp_or_inf)),
                verdict=verdict_of(interval, margin),
            )
        )
    return tuple(ratios)


def _most_changed(
    pairs: Pairs, delta_M: NDArray[np.float64], limit: int
) -> tuple[ChangedToken, ...]:
    order = np.argsort(-np.abs(delta_M), kind="stable")[:limit]
    tokens = pairs.tokens
    return tuple(
        ChangedToken(
            document=int(tokens.document[row]),
            token_index=int(tokens.token_index[row]),
            token=tokens.text_of(row),
            context=text_around(tokens, row, -CONTEXT_TOKENS),
            nll_reference=float(pairs.reference[index]),
            nll_candidate=float(pairs.candidate[index]),
            delta=float(delta_M[index]),
        )
        for index, row in zip(order.tolist(), pairs.rows[order].tolist(), strict=True)
        if delta_M[index] != 0
    )


def _perplexity(nll_M: NDArray[np.float32], name: str, reasons: dict[str, str]) -> float | None:
    value, reason = json_figure(name, exp_or_inf(mean_nll(NllTotals.of(nll_M))))
    if reason is not None:
        reasons[name] = reason
    return value

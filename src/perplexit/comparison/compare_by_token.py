"""compare: two runs over the same scored tokens → a paired ratio, its interval and a verdict.

Shape suffix: M = tokens that both runs scored with a finite loss, in window order.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.compared_tokens import compared_tokens
from perplexit.comparison.divergences import buckets_of, divergences_of
from perplexit.comparison.flips import CONTEXT_TOKENS, first_choices, flips_of, text_around
from perplexit.comparison.pairing import Pairs, paired, require_same_input
from perplexit.comparison.token_comparison import ChangedToken, Comparison, DomainRatio
from perplexit.comparison.verdicts import margin_of, verdict_of
from perplexit.metrics.bootstrap import Bootstrap, bootstrap_check
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import clusters_within, mean_interval, paired_interval
from perplexit.metrics.likelihood import exp_or_inf, json_figure, mean_nll
from perplexit.metrics.totals import NllTotals
from perplexit.option_ranges import check_numbers
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
    """The candidate against the reference, paired token by token. Either may be a run's folder.

    noise_floor: nats a token within which two runs of one model are known to differ; what a run
        measured of itself (`eval --measure-noise-floor`) counts too, and the largest decides.
    margin: the change of the perplexity that does not matter, as a share (0.01) or a percentage
        ("1%"): within ± log(1.01) of no difference two runs are equivalent.
    Raises FingerprintMismatchError, which says what differs, where the two runs did not score the
    same prepared input; RunError where a run is incomplete; EmptyScoreError without common tokens.
    """
    check_numbers(num_most_changed=num_most_changed)
    reference_run, candidate_run = _opened(reference), _opened(candidate)
    allowed = margin_of(
        reference_run, candidate_run, noise_floor=noise_floor, margin=margin, per_byte=False
    )
    require_same_input(reference_run, candidate_run)
    pairs = paired(reference_run.tokens, candidate_run.tokens)
    interval = paired_interval(pairs.reference, pairs.candidate, pairs.clusters, confidence)
    delta_M = pairs.delta
    absolute = mean_interval(np.abs(delta_M), pairs.clusters, confidence).clamped(lowest=0)
    divergences, why_not = divergences_of(reference_run, candidate_run, pairs, confidence)
    choices = first_choices(reference_run, candidate_run, pairs)
    reasons = {} if interval.reason is None else {"ppl_ratio_low": interval.reason}
    return Comparison(
        verdict=verdict_of(interval, allowed.nats),
        perplexity_reference=_perplexity(pairs.reference, "perplexity_reference", reasons),
        perplexity_candidate=_perplexity(pairs.candidate, "perplexity_candidate", reasons),
        log_perplexity_difference=interval.value,
        log_perplexity_difference_low=interval.low,
        log_perplexity_difference_high=interval.high,
        ppl_ratio=exp_or_inf(interval.value),
        ppl_ratio_low=_exp(interval.low),
        ppl_ratio_high=_exp(interval.high),
        num_tokens=len(delta_M),
        num_unpaired=pairs.num_unpaired,
        max_abs_nll_difference=float(np.abs(delta_M).max()),
        mean_abs_nll_difference=absolute.value,
        mean_abs_nll_difference_low=absolute.low,
        mean_abs_nll_difference_high=absolute.high,
        confidence=confidence,
        interval_method=pairs.clusters.method,
        num_clusters=pairs.clusters.num_clusters,
        margin=allowed.nats,
        noise_floor=allowed.noise,
        margin_asked=allowed.asked,
        bootstrap=_bootstrap(pairs, interval),
        input_fingerprint=reference_run.input_fingerprint,
        reference=_conditions(reference_run),
        candidate=_conditions(candidate_run),
        domains=_domain_ratios(pairs, confidence, allowed.nats),
        most_changed=_most_changed(pairs, delta_M, num_most_changed),
        flips=flips_of(
            reference_run,
            candidate_run,
            pairs,
            choices,
            limit=num_most_changed,
            confidence=confidence,
        ),
        divergences=divergences,
        buckets=buckets_of(candidate_run, pairs, divergences),
        reasons=reasons,
        warnings=(*_warnings(pairs), *why_not),
        tokens=compared_tokens(
            candidate_run, pairs, divergences=divergences, choices=choices, confidence=confidence
        ),
    )


def _bootstrap(pairs: Pairs, interval: Estimate) -> Bootstrap | None:
    labels, count = pairs.clusters.labels, pairs.clusters.num_clusters
    sums_C = np.bincount(labels, weights=pairs.delta, minlength=count).astype(np.float64)
    return bootstrap_check(sums_C, np.bincount(labels, minlength=count), interval)


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
                pairs.tokens.domains[code],
                len(inside),
                exp_or_inf(interval.value),
                _exp(interval.low),
                _exp(interval.high),
                verdict_of(interval, margin),
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


def _warnings(pairs: Pairs) -> tuple[str, ...]:
    if pairs.num_unpaired == 0:
        return ()
    return (f"{pairs.num_unpaired} tokens with a loss that is not finite in a run are left out",)


def _conditions(run: Run) -> dict[str, Any]:
    return {
        "folder": None if run.folder is None else str(run.folder),
        "model": dict(run.model),
        "session": dict(run.session),
    }


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(run)


def _perplexity(nll_M: NDArray[np.float32], name: str, reasons: dict[str, str]) -> float | None:
    value, reason = json_figure(name, exp_or_inf(mean_nll(NllTotals.of(nll_M))))
    if reason is not None:
        reasons[name] = reason
    return value


def _exp(exponent: float | None) -> float | None:
    return None if exponent is None else exp_or_inf(exponent)

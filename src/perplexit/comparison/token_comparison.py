"""Comparison: a candidate against a reference over the same tokens, as a record and as text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from perplexit.comparison.compared_tokens import ComparedTokens
from perplexit.comparison.divergences import Divergences
from perplexit.comparison.flips import Flip, Flips
from perplexit.comparison.verdict_record import VerdictRecord, estimate_text, range_text, run_name
from perplexit.comparison.verdict_sentences import Judged, changed_predictions
from perplexit.comparison.verdicts import Verdict
from perplexit.metrics.bootstrap import Bootstrap
from perplexit.metrics.distribution import Distribution
from perplexit.metrics.estimate import Estimate

_MAIN_FIGURES = {
    "ppl_ratio": "perplexity ratio",
    "log_perplexity_difference": "change, nats per token",
    "mean_kl": "KL, nats per token",
    "top1_agreement": "same first choice",
}
_DIVERGENCE_LINES = {
    "mean_kl": "KL:",
    "mean_reverse_kl": "reverse KL:",
    "mean_js": "JS:",
    "top1_agreement": "same top 1:",
    "top10_agreement": "top 10:",
    "mean_delta_p": "delta p:",
}


@dataclass(frozen=True, slots=True)
class ChangedToken:
    """A token whose loss changed, with the text before it. `delta` = candidate - reference."""

    document: int
    token_index: int
    token: str
    context: str
    nll_reference: float
    nll_candidate: float
    delta: float


@dataclass(frozen=True, slots=True)
class DomainRatio:
    """One domain's paired ratio and verdict; `low` and `high` are None without an interval."""

    domain: str
    num_tokens: int
    ppl_ratio: float
    ppl_ratio_low: float | None
    ppl_ratio_high: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(VerdictRecord):
    """A candidate against a reference, over the tokens that both scored with a finite loss.

    log_perplexity_difference: mean of candidate - reference nll, nats per token; above 0 is worse.
    ppl_ratio:   exp of it, the candidate's perplexity over the reference's.
    divergences: KL and related figures, where the candidate was scored with this reference.
    buckets:     the change of the loss by position, token frequency and confidence.
    bootstrap:   the block bootstrap of the same difference, as a check of the interval.
    flips:       tokens at which the models' first choices differ; None where no run tells.
    num_unpaired: tokens left out because a loss was not finite; `warnings` says so.
    tokens:      the per-token columns that belong to this comparison, for drawings; not in JSON.
    """

    perplexity_reference: float | None
    perplexity_candidate: float | None
    log_perplexity_difference: float
    log_perplexity_difference_low: float | None
    log_perplexity_difference_high: float | None
    ppl_ratio: float
    ppl_ratio_low: float | None
    ppl_ratio_high: float | None
    num_tokens: int
    num_unpaired: int
    max_abs_nll_difference: float
    mean_abs_nll_difference: float
    mean_abs_nll_difference_low: float | None = None
    mean_abs_nll_difference_high: float | None = None
    input_fingerprint: str
    bootstrap: Bootstrap | None = None
    flips: Flips | None = None
    domains: tuple[DomainRatio, ...] = ()
    most_changed: tuple[ChangedToken, ...] = ()
    divergences: Divergences | None = None
    buckets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tokens: ComparedTokens | None = field(default=None, repr=False, compare=False)

    not_in_json: ClassVar[tuple[str, ...]] = ("tokens",)

    def figures(self) -> dict[str, Estimate]:
        """Return the figures by the names that gates use; `mean_kl` with its upper bound."""
        figures = self.measured_figures()
        if "mean_kl_high" in figures:  # a gate must hold for the upper bound
            high = figures["mean_kl_high"].high
            figures["mean_kl"] = replace(figures["mean_kl"], high=high)
        return figures

    def measured_figures(self) -> dict[str, Estimate]:
        """Return the figures, each with its own interval: that of a KL may be of a lower bound."""
        means = ("ppl_ratio", "log_perplexity_difference", "mean_abs_nll_difference")
        figures = {name: self.estimate(name) for name in means}
        figures["max_abs_nll_difference"] = Estimate(self.max_abs_nll_difference)
        if self.divergences is not None:
            for name, found in self.divergences.columns.items():
                figures |= _divergence_figures(name, found)
        if self.flips is not None and self.flips.agreement is not None:
            figures.setdefault("top1_agreement", self.flips.agreement)
        return figures

    def _main_figures(self) -> dict[str, Estimate]:
        figures = self.measured_figures()
        perplexities = {
            f"perplexity, {side}": Estimate(value)
            for side, value in (
                ("reference", self.perplexity_reference),
                ("candidate", self.perplexity_candidate),
            )
            if value is not None
        }
        main = {text: figures[name] for name, text in _MAIN_FIGURES.items() if name in figures}
        return perplexities | main

    @property
    def judged(self) -> Judged:
        """Return the difference and its margin, from which the verdict is put into words."""
        floor = None if self.divergences is None else self.divergences.floor
        return Judged(
            self.estimate("log_perplexity_difference"),
            self._margin,
            unit="token",
            num_units=self.num_tokens,
            changed=changed_predictions(
                self.measured_figures(), 0.0 if floor is None else floor[0]
            ),
            identical=self.max_abs_nll_difference == 0,
        )

    def __repr__(self) -> str:
        ratio = estimate_text(self.estimate("ppl_ratio"), ".6g", basis=False)
        return f"Comparison({self.verdict}: perplexity ratio {ratio}, {self.num_tokens:,} tokens)"

    def __str__(self) -> str:
        nll_change = estimate_text(self.estimate("log_perplexity_difference"), "+.2e", basis=False)
        lines = [
            f"verdict:    {self.verdict}. {self.sentence}",
            f"reference:  perplexity {_figure(self.perplexity_reference)}  "
            f"{run_name(self.reference)}",
            f"candidate:  perplexity {_figure(self.perplexity_candidate)}  "
            f"{run_name(self.candidate)}",
            f"ratio:      {estimate_text(self.estimate('ppl_ratio'), '.6f')}",
            f"nll change: {nll_change} nats per token",
            f"per token:  {self.mean_abs_nll_difference:.2e} on average, "
            f"{self.max_abs_nll_difference:.2e} at most, over {self.num_tokens:,} tokens",
        ]
        if self.divergences is not None:
            lines += _divergence_lines(self.measured_figures(), self.divergences.floor)
        lines += _bootstrap_lines(self.bootstrap, self.interval_method)
        reasons = [text for name, text in self.reasons.items() if name != "ppl_ratio_low"]
        lines += [f"note:       {text}" for text in (*reasons, *self.warnings)]
        for row in self.domains:
            interval = range_text(row.ppl_ratio_low, row.ppl_ratio_high, ".5f")
            ratio = f"{row.ppl_ratio:.5f} {interval}".rstrip()
            lines.append(f"  {row.domain}: ratio {ratio}, {row.verdict}")
        if self.most_changed:
            lines.append("most changed tokens (reference -> candidate, nats):")
        lines += [
            f"  {t.nll_reference:8.4f} -> {t.nll_candidate:8.4f}  {t.context!r} {t.token!r}"
            for t in self.most_changed
        ]
        return "\n".join([*lines, *_flip_lines(self.flips)])


def _bootstrap_lines(bootstrap: Bootstrap | None, method: str) -> list[str]:
    if bootstrap is None or bootstrap.agrees:
        return []
    ends = range_text(math.exp(bootstrap.low), math.exp(bootstrap.high), ".6f")
    one, more = ("document", "documents") if method == "document" else ("stretch", "text")
    part, share = bootstrap.decisive_share, bootstrap.decisive_token_share
    return [
        f"note:       one {one} with {share:.1%} of the tokens makes {part:.0%} of the variance; "
        f"drawn anew (bootstrap) the ratio lies in {ends}. The interval may be too narrow: look "
        f"at the most changed tokens, or take more {more}"
    ]


def _flip_lines(flips: Flips | None) -> list[str]:
    if flips is None or not flips.count:
        return []
    more = "" if flips.complete else " or more"
    share = 100 * flips.count / flips.num_tokens
    lines = [
        f"first choice changed at {flips.count:,}{more} of {flips.num_tokens:,} tokens "
        f"({share:.2g} %)" + (", the surest first:" if flips.listed else "")
    ]
    return [*lines, *(f"  {_flip_line(flip)}" for flip in flips.listed)]


def _flip_line(flip: Flip) -> str:
    sure = "" if flip.reference_p is None else f"p {flip.reference_p:.2f}  "
    choices = " -> ".join(
        "(not recorded)" if top is None else repr(top)
        for top in (flip.reference_top1, flip.candidate_top1)
    )
    return f"{sure}{choices}  in {flip.context!r} [{flip.token!r}] {flip.after!r}"


_FIGURE_NAMES = {"same_top1": "top1_agreement", "top_k_agreement": "top10_agreement"}


def _divergence_figures(name: str, found: Distribution) -> dict[str, Estimate]:
    """Return a column's figures: `mean_kl`, `median_kl`, `p99.9_kl`, `max_kl`, or a share."""
    if name in _FIGURE_NAMES:
        return {_FIGURE_NAMES[name]: found.mean}
    figures = {f"mean_{name}": found.mean, f"median_{name}": Estimate(found.median)}
    figures |= {f"p{percent:g}_{name}": Estimate(value) for percent, value in found.percentiles}
    figures[f"rms_{name}"] = Estimate(found.root_mean_square)
    figures[f"max_{name}"] = Estimate(found.maximum)
    return figures


def _divergence_lines(
    figures: Mapping[str, Estimate], floor: tuple[float, float] | None
) -> list[str]:
    lines = [
        f"{label:<12}{figures[name].value:.4g} "
        + range_text(figures[name].low, figures[name].high, ".4g")
        for name, label in _DIVERGENCE_LINES.items()
        if name in figures
    ]
    lines = [line.rstrip() for line in lines]
    if "median_kl" in figures:
        lines[0] += (
            f" nats a token; median {figures['median_kl'].value:.3g}, "
            f"99.9 % {figures['p99.9_kl'].value:.3g}, largest {figures['max_kl'].value:.3g}"
        )
    if "mean_kl_high" in figures:
        high = figures["mean_kl_high"]
        lines[0] += (
            f"; a lower bound, as the reference is known in part: at most {high.value:.4g} "
            + range_text(high.low, high.high, ".4g")
        )
    if floor is not None:
        lines[0] += f"; the reference with itself: {floor[0]:.1e}"
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"

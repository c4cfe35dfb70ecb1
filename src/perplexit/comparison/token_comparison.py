"""Comparison: what two runs over the same tokens say of each other, as a record and as text."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from perplexit.comparison.compared_tokens import ComparedTokens
from perplexit.comparison.divergences import Divergences
from perplexit.comparison.flips import Flip, Flips
from perplexit.comparison.verdict_sentences import Judged, changed_predictions
from perplexit.comparison.verdicts import Margin, Verdict, resolution_of
from perplexit.metrics.bootstrap import Bootstrap
from perplexit.metrics.distribution import Distribution
from perplexit.metrics.estimate import Estimate
from perplexit.runs.identity import plain_json


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
class Comparison:
    """A candidate against a reference, over the tokens that both scored with a finite loss.

    log_perplexity_difference: mean of candidate - reference nll, nats a token; above 0 is worse.
    ppl_ratio:   exp of it, the candidate's perplexity over the reference's.
    verdict:     'worse' where the interval lies above `margin`, 'better' below -`margin`,
                 'equivalent' inside ± `margin`; else, and without an interval, 'inconclusive'.
    divergences: KL and what goes with it, where the candidate was scored with this reference.
    buckets:     the change of the loss by position, token frequency and confidence.
    margin:      max(1e-5, the noise floors, the margin asked for), nats per token;
                 `noise_floor` has the floors in nats, `margin_asked` the share of the perplexity.
    bootstrap:   the block bootstrap of the same difference, as a check of the interval.
    flips:       tokens at which the models' first choices differ; None where no run tells.
    num_unpaired: tokens left out because a loss was not finite; `warnings` says so.
    tokens:      the per-token columns that belong to this comparison, for drawings; not in JSON.
    """

    verdict: Verdict
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
    confidence: float
    interval_method: str
    num_clusters: int
    margin: float
    input_fingerprint: str
    reference: dict[str, Any]
    candidate: dict[str, Any]
    mean_abs_nll_difference_low: float | None = None
    mean_abs_nll_difference_high: float | None = None
    noise_floor: dict[str, float | None] = field(default_factory=dict)
    margin_asked: float = 0.0
    bootstrap: Bootstrap | None = None
    flips: Flips | None = None
    domains: tuple[DomainRatio, ...] = ()
    most_changed: tuple[ChangedToken, ...] = ()
    divergences: Divergences | None = None
    buckets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tokens: ComparedTokens | None = field(default=None, repr=False, compare=False)

    def figures(self) -> dict[str, Estimate]:
        """The figures by the names that gates use."""
        means = ("ppl_ratio", "log_perplexity_difference", "mean_abs_nll_difference")
        figures = {name: recorded_estimate(self, name) for name in means}
        figures["max_abs_nll_difference"] = Estimate(self.max_abs_nll_difference)
        if self.divergences is not None:
            for name, found in self.divergences.columns.items():
                figures |= _divergence_figures(name, found)
        if "mean_kl_high" in figures:  # a gate must hold for the upper bound
            high = figures["mean_kl_high"].high
            figures["mean_kl"] = replace(figures["mean_kl"], high=high)
        if self.flips is not None and self.flips.agreement is not None:
            figures.setdefault("top1_agreement", self.flips.agreement)
        return figures

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values, every number finite or null."""
        record = asdict(replace(self, tokens=None)) | told_in_json(self.judged)
        del record["tokens"]
        plain: dict[str, Any] = plain_json(record)
        return plain

    @property
    def judged(self) -> Judged:
        """The difference and its margin, which tell the verdict in words."""
        floor = None if self.divergences is None else self.divergences.floor
        figures = self.figures()
        if self.divergences is not None and "kl" in self.divergences.columns:
            figures["mean_kl"] = self.divergences.columns["kl"].mean  # its own, not the upper bound
        return Judged(
            recorded_estimate(self, "log_perplexity_difference"),
            Margin(self.margin, self.margin_asked, self.noise_floor),
            unit="token",
            num_units=self.num_tokens,
            changed=changed_predictions(figures, 0.0 if floor is None else floor[0]),
            identical=self.max_abs_nll_difference == 0,
        )

    @property
    def sentence(self) -> str:
        """The verdict in plain words, with what is known and what more text would show."""
        return self.judged.sentence()

    def __repr__(self) -> str:
        ratio = shown_with_basis(recorded_estimate(self, "ppl_ratio"), ".6g", basis=False)
        return f"Comparison({self.verdict}: perplexity ratio {ratio}, {self.num_tokens:,} tokens)"

    def __str__(self) -> str:
        lines = [
            f"verdict:    {self.verdict}. {self.sentence}",
            f"reference:  perplexity {_shown(self.perplexity_reference)}  {_name(self.reference)}",
            f"candidate:  perplexity {_shown(self.perplexity_candidate)}  {_name(self.candidate)}",
            f"ratio:      {shown_with_basis(recorded_estimate(self, 'ppl_ratio'), '.6f')}",
            "nll change: "
            + shown_with_basis(
                recorded_estimate(self, "log_perplexity_difference"), "+.2e", basis=False
            )
            + " nats per token",
            f"per token:  {self.mean_abs_nll_difference:.2e} on average, "
            f"{self.max_abs_nll_difference:.2e} at most, over {self.num_tokens:,} tokens",
        ]
        if self.divergences is not None:
            lines += _divergence_lines(self.figures(), self.divergences)
        lines += _bootstrap_lines(self.bootstrap, self.interval_method)
        reasons = [text for name, text in self.reasons.items() if name != "ppl_ratio_low"]
        lines += [f"note:       {text}" for text in (*reasons, *self.warnings)]
        for row in self.domains:
            interval = _range(row.ppl_ratio_low, row.ppl_ratio_high, ".5f")
            shown = f"{row.ppl_ratio:.5f} {interval}".rstrip()
            lines.append(f"  {row.domain}: ratio {shown}, {row.verdict}")
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
    ends = _range(math.exp(bootstrap.low), math.exp(bootstrap.high), ".6f")
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
    least = "" if flips.complete else "at least "
    share = 100 * flips.count / flips.num_tokens
    lines = [
        f"first choice changed at {least}{flips.count:,} of {flips.num_tokens:,} tokens "
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
    """A column's figures: `mean_kl`, `median_kl`, `p99.9_kl`, `max_kl`, or a share."""
    if name in _FIGURE_NAMES:
        return {_FIGURE_NAMES[name]: found.mean}
    figures = {f"mean_{name}": found.mean, f"median_{name}": Estimate(found.median)}
    figures |= {f"p{percent:g}_{name}": Estimate(value) for percent, value in found.percentiles}
    figures[f"rms_{name}"] = Estimate(found.root_mean_square)
    figures[f"max_{name}"] = Estimate(found.maximum)
    return figures


def _divergence_lines(figures: Mapping[str, Estimate], divergences: Divergences) -> list[str]:
    if "kl" in divergences.columns:  # with its own interval, where it is a lower bound
        figures = {**figures, "mean_kl": divergences.columns["kl"].mean}
    floor, lines = divergences.floor, []
    for label, name in (
        ("KL:", "mean_kl"),
        ("reverse KL:", "mean_reverse_kl"),
        ("JS:", "mean_js"),
        ("same top 1:", "top1_agreement"),
        ("top 10:", "top10_agreement"),
        ("delta p:", "mean_delta_p"),
    ):
        if name in figures:
            figure = figures[name]
            interval = _range(figure.low, figure.high, ".4g")
            lines.append(f"{label:<12}{figure.value:.4g} {interval}".rstrip())
    if "median_kl" in figures:
        lines[0] += (
            f" nats a token; median {figures['median_kl'].value:.3g}, "
            f"99.9 % {figures['p99.9_kl'].value:.3g}, largest {figures['max_kl'].value:.3g}"
        )
    if "mean_kl_high" in figures:
        high = figures["mean_kl_high"]
        lines[0] += (
            f"; a lower bound, as the reference is known in part: at most {high.value:.4g} "
            + _range(high.low, high.high, ".4g")
        )
    if floor is not None:
        lines[0] += f"; the reference with itself: {floor[0]:.1e}"
    return lines


def _name(conditions: Mapping[str, Any]) -> str:
    session = conditions["session"]
    quantization = session.get("quantization") or {}
    parts = (session.get("engine"), session.get("dtype"), quantization.get("name"))
    return " ".join([*(str(p) for p in parts if p), str(conditions["model"].get("address"))])


def recorded_estimate(comparison: Any, name: str) -> Estimate:
    """Return the field `name` of a comparison with its `_low` and `_high` as an Estimate."""
    value, low, high = (getattr(comparison, f"{name}{end}") for end in ("", "_low", "_high"))
    reason = None if low is not None else next(iter(comparison.reasons.values()), None)
    method, count = comparison.interval_method, comparison.num_clusters
    return Estimate(value, low, high, method, count, comparison.confidence, reason=reason)


def told_in_json(judged: Judged) -> dict[str, Any]:
    """Return the verdict's sentence, and what the text can show, for a JSON document."""
    found = resolution_of(judged.difference, judged.margin.nats)
    return {
        "sentence": judged.sentence(),
        "resolution": None if found is None else asdict(found),
    }


def shown_with_basis(found: Estimate, form: str, *, basis: bool = True) -> str:
    """Return `1.0171 [1.0115, 1.0228] (95 %, 24 clusters: document)`, or the value alone."""
    ends = _range(found.low, found.high, form.removeprefix("+"))
    rests_on = f"({found.basis})" if basis and found.basis else ""
    return " ".join(filter(None, (f"{found.value:{form}}", ends, rests_on)))


def _range(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"

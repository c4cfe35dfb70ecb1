"""Verdicts in plain sentences: what is known, how far, and what would decide the rest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from perplexit.comparison.verdicts import (
    LARGEST_FACTOR,
    SMALLEST_DIFFERENCE,
    Margin,
    Verdict,
    resolution_of,
    verdict_of,
)
from perplexit.metrics.estimate import (
    Estimate,
    change,
    exact_percent,
    figure,
    interval,
    percent,
    quantity,
)

ROUND_MARGINS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # shares of the perplexity to suggest


@dataclass(frozen=True, slots=True)
class Judged:
    """A difference in log-perplexity with its margin: everything that a verdict is told from.

    changed:   what says that the predictions moved, in words; empty where nothing does.
    unit:      "token" or "byte": what the difference is a mean over, `num_units` of them.
    identical: whether no loss differs at all.
    """

    difference: Estimate
    margin: Margin
    unit: str
    num_units: int
    changed: str = ""
    identical: bool = False

    @property
    def verdict(self) -> Verdict:
        """Return what the interval says, given the margin."""
        return verdict_of(self.difference, self.margin.nats)

    @property
    def measure(self) -> str:
        """Return `perplexity`, or `byte perplexity`."""
        return "perplexity" if self.unit == "token" else "byte perplexity"

    def predicate(self, reference: str) -> str:
        """Return what follows the candidate's name: `is worse than full`."""
        if self.identical and self.verdict in ("equivalent", "inconclusive"):
            return f"has the same loss as {reference} on every {self.unit}"
        if self.verdict == "inconclusive":
            return self._undecided(reference)
        if self.verdict == "equivalent":
            return f"is equivalent to {reference}{self._within()}"
        return f"is {self.verdict} than {reference}"

    def _within(self) -> str:
        if self.margin.is_asked:
            return f" within {exact_percent(self.margin.asked)}"
        return " within the noise floor"

    def _undecided(self, reference: str) -> str:
        low, high = self.difference.low, self.difference.high
        if low is not None and high is not None and (low > 0 or high < 0):
            side = "higher" if low > 0 else "lower"
            says = (
                f"has a {side} {self.measure} than {reference}, perhaps by less than the margin "
                f"({self.margin_in_words})"
            )
            return says + (f"; {self.changed}" if self.changed else "")
        says = (
            f"cannot be told from {reference} by {self.measure} on {self.num_units:,} "
            f"{self.unit}{'' if self.num_units == 1 else 's'}"
        )
        return says + (f", but {self.changed}" if self.changed else "")

    @property
    def margin_in_words(self) -> str:
        """Return `1 %`, or `the noise floor, 0.0010 %`: a share of the perplexity."""
        if self.margin.is_asked:
            return exact_percent(self.margin.asked)
        return f"the noise floor, {percent(math.expm1(self.margin.nats))}"

    def detail(self) -> str:
        """Return the sentences behind the verdict: how large, and what more text would show."""
        if self.difference.low is None or self.difference.high is None:
            return self._without_interval()
        if self.verdict == "inconclusive":
            range_ = f"Its {self.measure} may be anything {self._span()}."
            return " ".join(filter(None, (range_, self._text_needed(), self._suggestion())))
        if self.verdict == "equivalent":
            return self._equivalent()
        value = self.difference.value
        side = "more" if value > 0 else "less"
        beyond = (
            f", beyond the margin of {exact_percent(self.margin.asked)}"
            if self.margin.is_asked
            else ""
        )
        ends = "" if self._span() == change(value) else f" ({self._span()})"
        return (
            f"Each {self.unit} costs it {quantity(abs(value))} nats {side} on average: its "
            f"{self.measure} is {change(value)}{ends}{beyond}."
        )

    def sentence(self) -> str:
        """Return the whole verdict of "the candidate" against "the reference"."""
        return f"The candidate {self.predicate('the reference')}. {self.detail()}"

    def _without_interval(self) -> str:
        reason = self.difference.reason or "no interval exists"
        if self.identical:
            return f"Without an interval nothing is claimed for another text: {reason}."
        value = self.difference.value
        size = "infinite" if not math.isfinite(value) else f"{change(value)}"
        return (
            f"Nothing is claimed: {reason}. The {self.measure} measured is {size}, and without an "
            "interval no difference can be shown, however large: score more text."
        )

    def _span(self) -> str:
        ends = [change(end or 0.0) for end in (self.difference.low, self.difference.high)]
        for side in (" higher", " lower"):
            if all(end.endswith(side) for end in ends):
                sizes = list(dict.fromkeys(end.removesuffix(side) for end in ends))
                return f"{'from ' if len(sizes) > 1 else ''}{' to '.join(sizes)}{side}"
        return f"from {ends[0]} to {ends[1]}"

    def _equivalent(self) -> str:
        low, high = self.difference.low or 0.0, self.difference.high or 0.0
        if self.identical:
            return f"Not one of {self.num_units:,} losses differs."
        inside = (
            f"inside the margin of {exact_percent(self.margin.asked)}"
            if self.margin.is_asked
            else f"inside the noise floor of {percent(math.expm1(self.margin.nats))}"
        )
        says = f"The whole interval lies {inside}: its {self.measure} is {self._span()}."
        if low > 0 or high < 0:
            says += (
                f" It is {'higher' if low > 0 else 'lower'}, but by less than that: too little "
                "to matter."
            )
        return says + (f" Its predictions did change: {self.changed}." if self.changed else "")

    def _text_needed(self) -> str:
        found = resolution_of(self.difference, self.margin.nats)
        if found is None:
            return ""
        says = f"This text can show a difference of {_size(found.smallest_shown)} or more"
        if found.text_factor is None:
            return (
                f"{says}; to decide so small a difference it would take more than "
                f"{LARGEST_FACTOR:,} times as much text."
            )
        times = max(found.text_factor, 1.1)
        many = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
        return (
            f"{says}; about {many} times as much text would decide it, if the {self.measure} "
            f"stays {change(self.difference.value)}."
        )

    def _suggestion(self) -> str:
        """Return the smallest round margin within which the two would be equivalent."""
        if self.margin.asked:
            return ""
        low, high = self.difference.low or 0.0, self.difference.high or 0.0
        farthest = max(abs(low), abs(high))
        for share in ROUND_MARGINS:
            if farthest <= math.log1p(share):
                return f"With --margin {100 * share:g}% they would count as equivalent."
        return ""


def _size(nats: float) -> str:
    """Return a difference in log-perplexity as one of the perplexity, whatever its side."""
    if nats < math.log(2):
        return percent(math.expm1(nats))
    return f"a factor of {math.exp(min(nats, 700.0)):.2g}"


def changed_predictions(figures: Mapping[str, Estimate], floor: float) -> str:
    """Return what says that predictions moved: `KL is 0.233 [0.19, 0.28] and …`, or nothing.

    A KL counts where its low end (its value, without an interval) is above `floor`, what storage
    and rounding can make of the KL of a model with itself; an agreement where its high end is
    below 1.
    """
    parts = []
    kl = figures.get("mean_kl")
    if kl is not None and (kl.value if kl.low is None else kl.low) > max(
        floor, SMALLEST_DIFFERENCE
    ):
        shown = figure(kl.value, kl.low, kl.high) if kl.value >= 1e-3 else f"{kl.value:.2g}"
        ends = interval(kl.low, kl.high) if kl.value >= 1e-3 else _short(kl)
        parts.append(f"KL is {shown} {ends}".rstrip())
    same = figures.get("top1_agreement")
    if same is not None and (same.value if same.high is None else same.high) < 1:
        parts.append(f"the first choice is the same at {_share(same.value)} of the tokens")
    return " and ".join(parts)


def _share(share: float) -> str:
    """Return a share of tokens as a percentage that is never rounded to 100."""
    for places in range(8):
        shown = f"{100 * share:.{places}f}"
        if float(shown) < 100:
            return f"{shown}\N{NO-BREAK SPACE}%"
    return f"{100 * share}\N{NO-BREAK SPACE}%"


def _short(found: Estimate) -> str:
    return "" if found.low is None or found.high is None else f"[{found.low:.2g}, {found.high:.2g}]"

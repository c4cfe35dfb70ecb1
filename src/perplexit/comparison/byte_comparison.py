"""ByteComparison: what two runs over one text say of each other, byte by byte: record and text."""

from dataclasses import asdict, dataclass, field
from typing import Any

from perplexit.comparison.token_comparison import (
    recorded_estimate,
    shown_with_basis,
    told_in_json,
)
from perplexit.comparison.verdict_sentences import Judged
from perplexit.comparison.verdicts import Margin, Verdict
from perplexit.metrics.estimate import Estimate
from perplexit.runs.identity import plain_json


@dataclass(frozen=True, slots=True)
class ChangedSegment:
    """Bytes on which the two models differ; `delta` = candidate - reference, nats."""

    document: int
    byte_start: int  # in the document's UTF-8
    text: str
    context: str  # the text right before
    nll_reference: float
    nll_candidate: float
    delta: float


@dataclass(frozen=True, kw_only=True, repr=False)
class ByteComparison:
    """A candidate against a reference over the bytes that both scored, whatever their tokenizers.

    bits_per_byte_*: of each run over the `num_bytes` common bytes (not its own figure, which
        counts the bytes that it scored alone too).
    log_difference:  mean of candidate - reference, nats a byte; above 0 is worse.
    byte_ratio:      exp of it: the candidate's byte perplexity over the reference's.
    bits_per_byte_ratio: the candidate's bits per byte over the reference's.
    verdict:         as in Comparison; `margin` in nats per byte, `margin_asked` as a share of the
        byte perplexity.
    num_segments:    stretches between common token boundaries that both runs scored whole.
    num_unaligned_bytes_*: bytes that the run scored but that are not in a common segment.
    """

    verdict: Verdict
    bits_per_byte_reference: float
    bits_per_byte_candidate: float
    bits_per_byte_difference: float
    bits_per_byte_difference_low: float | None
    bits_per_byte_difference_high: float | None
    log_difference: float
    log_difference_low: float | None
    log_difference_high: float | None
    byte_ratio: float
    byte_ratio_low: float | None
    byte_ratio_high: float | None
    bits_per_byte_ratio: float
    bits_per_byte_ratio_low: float | None
    bits_per_byte_ratio_high: float | None
    num_bytes: int
    num_segments: int
    num_tokens_reference: int
    num_tokens_candidate: int
    num_unaligned_bytes_reference: int
    num_unaligned_bytes_candidate: int
    confidence: float
    interval_method: str
    num_clusters: int
    margin: float
    text_fingerprint: str
    same_tokenizer: bool
    reference: dict[str, Any]
    candidate: dict[str, Any]
    bits_per_byte_reference_low: float | None = None
    bits_per_byte_reference_high: float | None = None
    bits_per_byte_candidate_low: float | None = None
    bits_per_byte_candidate_high: float | None = None
    noise_floor: dict[str, float | None] = field(default_factory=dict)
    margin_asked: float = 0.0
    most_changed: tuple[ChangedSegment, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def figures(self) -> dict[str, Estimate]:
        """The figures by the names that gates use."""
        names = (
            "bits_per_byte_ratio",
            "bits_per_byte_difference",
            "byte_ratio",
            "log_difference",
            "bits_per_byte_candidate",
        )
        return {name: recorded_estimate(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values, every number finite or null."""
        record = asdict(self) | {"unit": "byte"} | told_in_json(self.judged)
        plain: dict[str, Any] = plain_json(record)
        return plain

    @property
    def judged(self) -> Judged:
        """The difference and its margin, which tell the verdict in words."""
        return Judged(
            recorded_estimate(self, "log_difference"),
            Margin(self.margin, self.margin_asked, self.noise_floor),
            unit="byte",
            num_units=self.num_bytes,
        )

    @property
    def sentence(self) -> str:
        """The verdict in plain words, with what is known and what more text would show."""
        return self.judged.sentence()

    def __repr__(self) -> str:
        ratio = shown_with_basis(self.figures()["byte_ratio"], ".6g", basis=False)
        return f"ByteComparison({self.verdict}: byte ratio {ratio}, {self.num_bytes:,} bytes)"

    def __str__(self) -> str:
        figures = self.figures()
        ours, theirs = self.bits_per_byte_reference, self.bits_per_byte_candidate
        lines = [
            f"verdict:    {self.verdict} (byte by byte: the tokens differ). {self.sentence}",
            f"reference:  {ours:.6g} bits per byte  {_name(self.reference)}",
            f"candidate:  {theirs:.6g} bits per byte  {_name(self.candidate)}",
            "ratio:      "
            + shown_with_basis(figures["byte_ratio"], ".6f")
            + ", of the byte perplexities",
            "change:     "
            + shown_with_basis(figures["bits_per_byte_difference"], "+.2e", basis=False)
            + " bits per byte",
            f"aligned:    {self.num_bytes:,} bytes in {self.num_segments:,} common segments "
            f"({self.num_tokens_reference:,} and {self.num_tokens_candidate:,} tokens)",
        ]
        lines += [f"note:       {text}" for text in self.warnings]
        if self.most_changed:
            lines.append("most changed segments (reference -> candidate, nats):")
        lines += [
            f"  {s.nll_reference:8.4f} -> {s.nll_candidate:8.4f}  {s.context!r} {s.text!r}"
            for s in self.most_changed
        ]
        return "\n".join(lines)


def _name(conditions: dict[str, Any]) -> str:
    session, model = conditions["session"], conditions["model"]
    return f"{session.get('engine')} {session.get('dtype')} {model.get('address')}"

"""ByteComparison: a candidate against a reference over one text, byte by byte."""

from dataclasses import dataclass

from perplexit.comparison.verdict_record import VerdictRecord, estimate_text, run_name
from perplexit.comparison.verdict_sentences import Judged
from perplexit.comparison.verdicts import Margin
from perplexit.metrics.estimate import Estimate

_GATE_FIGURES = (
    "bits_per_byte_ratio",
    "bits_per_byte_difference",
    "byte_ratio",
    "log_difference",
    "bits_per_byte_candidate",
)
_MAIN_FIGURES = {
    "bits_per_byte_reference": "bits per byte, reference",
    "bits_per_byte_candidate": "bits per byte, candidate",
    "bits_per_byte_difference": "change, bits per byte",
    "byte_ratio": "byte perplexity ratio",
}


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
class ByteComparison(VerdictRecord):
    """A candidate against a reference over the bytes that both scored, whatever their tokenizers.

    bits_per_byte_*: of each run over the `num_bytes` common bytes (not its own figure, which
        counts the bytes that it scored alone too).
    log_difference:  mean of candidate - reference, nats per byte; above 0 is worse.
    byte_ratio:      exp of it: the candidate's byte perplexity over the reference's.
    bits_per_byte_ratio: the candidate's bits per byte over the reference's.
    num_segments:    stretches between common token boundaries that both runs scored whole.
    num_unaligned_bytes_*: bytes that the run scored but that are not in a common segment.
    `margin` is in nats per byte, `margin_asked` a share of the byte perplexity.
    """

    unit: str = "byte"
    bits_per_byte_reference: float
    bits_per_byte_reference_low: float | None = None
    bits_per_byte_reference_high: float | None = None
    bits_per_byte_candidate: float
    bits_per_byte_candidate_low: float | None = None
    bits_per_byte_candidate_high: float | None = None
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
    text_fingerprint: str
    same_tokenizer: bool
    most_changed: tuple[ChangedSegment, ...] = ()

    def figures(self) -> dict[str, Estimate]:
        """Return the figures by the names that gates use."""
        return {name: self.estimate(name) for name in _GATE_FIGURES}

    def _main_figures(self) -> dict[str, Estimate]:
        return {text: self.estimate(name) for name, text in _MAIN_FIGURES.items()}

    @property
    def judged(self) -> Judged:
        """Return the difference and its margin, from which the verdict is put into words."""
        return Judged(
            self.estimate("log_difference"),
            Margin(self.margin, self.margin_asked, self.noise_floor),
            unit=self.unit,
            num_units=self.num_bytes,
        )

    def __repr__(self) -> str:
        ratio = estimate_text(self.estimate("byte_ratio"), ".6g", basis=False)
        return f"ByteComparison({self.verdict}: byte ratio {ratio}, {self.num_bytes:,} bytes)"

    def __str__(self) -> str:
        ours, theirs = self.bits_per_byte_reference, self.bits_per_byte_candidate
        bits = estimate_text(self.estimate("bits_per_byte_difference"), "+.2e", basis=False)
        lines = [
            f"verdict:    {self.verdict} (byte by byte: the tokens differ). {self.sentence}",
            f"reference:  {ours:.6g} bits per byte  {run_name(self.reference)}",
            f"candidate:  {theirs:.6g} bits per byte  {run_name(self.candidate)}",
            f"ratio:      {estimate_text(self.estimate('byte_ratio'), '.6f')}, "
            "of the byte perplexities",
            f"change:     {bits} bits per byte",
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

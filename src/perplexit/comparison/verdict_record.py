"""VerdictRecord: what a comparison records whether it pairs tokens or bytes, and its text."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from perplexit.comparison.verdict_sentences import Judged
from perplexit.comparison.verdicts import Margin, Verdict, resolution_of, verdict_of
from perplexit.metrics.estimate import Estimate
from perplexit.runs.html_table import html_table
from perplexit.runs.measurement import plain_json
from perplexit.runs.run import Run


@dataclass(frozen=True, kw_only=True, repr=False)
class VerdictRecord(ABC):
    """A candidate against a reference: the verdict, and everything that it rests on.

    verdict:      what the interval of candidate - reference says (`verdicts`).
    margin, margin_asked, noise_floor: as in `Margin`: nats, asked, noise.
    reference, candidate: the folder, model and session of each run.
    reasons:      why a figure or an interval is missing, by its name.
    """

    verdict: Verdict
    confidence: float
    interval_method: str
    num_clusters: int
    margin: float
    reference: dict[str, Any]
    candidate: dict[str, Any]
    noise_floor: dict[str, float | None] = field(default_factory=dict)
    margin_asked: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    not_in_json: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def judged(self) -> Judged:
        """Return the difference and its margin, from which the verdict is put into words."""

    @abstractmethod
    def figures(self) -> dict[str, Estimate]:
        """Return the figures by the names that gates use."""

    @abstractmethod
    def _main_figures(self) -> dict[str, Estimate]:
        """Return the figures of the HTML table by what people call them."""

    @property
    def _margin(self) -> Margin:
        return Margin(self.margin, self.margin_asked, self.noise_floor)

    @property
    def sentence(self) -> str:
        """Return the verdict in plain words: what is known, and what more text would show."""
        return self.judged.sentence()

    def estimate(self, name: str) -> Estimate:
        """Return the field `name` with its `_low` and `_high` as an Estimate."""
        value, low, high = (getattr(self, f"{name}{end}") for end in ("", "_low", "_high"))
        reason = None if low is not None else next(iter(self.reasons.values()), None)
        method, count = self.interval_method, self.num_clusters
        return Estimate(value, low, high, method, count, self.confidence, reason=reason)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values, every number finite or null."""
        left_out: dict[str, Any] = dict.fromkeys(self.not_in_json)
        record = asdict(replace(self, **left_out))
        for name in left_out:
            del record[name]
        judged = self.judged
        resolution = resolution_of(judged.difference, judged.margin.nats)
        record["sentence"] = judged.sentence()
        record["resolution"] = None if resolution is None else asdict(resolution)
        return dict(plain_json(record))

    def _repr_html_(self) -> str:
        """Return a small HTML table of the main figures for notebooks."""
        rows = [
            (name, f"{found.value:.6g}", range_text(found.low, found.high, ".6g"))
            for name, found in self._main_figures().items()
        ]
        return html_table(
            f"{type(self).__name__}: {self.verdict}",
            rows,
            header=("figure", "value", f"{100 * self.confidence:g} % interval"),
            notes=(self.sentence, *self.warnings),
        )


def with_ends(name: str, found: Estimate) -> dict[str, Any]:
    """Return an estimate as the three fields `name`, `name_low` and `name_high`."""
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def verdict_fields(difference: Estimate, margin: Margin) -> dict[str, Any]:
    """Return the fields of a record that follow from the difference and its margin."""
    return {
        "verdict": verdict_of(difference, margin.nats),
        "confidence": difference.confidence,
        "interval_method": difference.method,
        "num_clusters": difference.num_clusters,
        "margin": margin.nats,
        "noise_floor": margin.noise,
        "margin_asked": margin.asked,
    }


def run_conditions(run: Run) -> dict[str, Any]:
    """Return the folder, model and session of a run, as a comparison records them."""
    folder = None if run.folder is None else str(run.folder)
    return {"folder": folder, "model": dict(run.model), "session": dict(run.session)}


def precision_name(session: Mapping[str, Any]) -> str:
    """Return `pytorch float32`, `onnxruntime float32 int4`: engine, dtype and quantization."""
    quantization = session.get("quantization") or {}
    names = (session.get("engine"), session.get("dtype"), quantization.get("name"))
    return " ".join(str(name) for name in names if name)


def run_name(conditions: Mapping[str, Any]) -> str:
    """Return the engine, precision and address of one of a comparison's two runs."""
    return f"{precision_name(conditions['session'])} {conditions['model'].get('address')}".strip()


def estimate_text(found: Estimate, form: str, *, basis: bool = True) -> str:
    """Return `1.0171 [1.0115, 1.0228] (95 %, 24 clusters: document)`, or the value alone."""
    ends = range_text(found.low, found.high, form.removeprefix("+"))
    rests_on = f"({found.basis})" if basis and found.basis else ""
    return " ".join(filter(None, (f"{found.value:{form}}", ends, rests_on)))


def range_text(low: float | None, high: float | None, form: str) -> str:
    """Return `[1.0115, 1.0228]`; nothing where an end is missing."""
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"

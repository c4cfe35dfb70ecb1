"""Gates: bounds that a comparison must hold, judged on the interval's bad end.

`ppl_ratio<=1.01` passes when the upper end of the ratio's interval is at most 1.01: a candidate
passes when the measurement shows that it is good enough, not when it fails to show that it is bad.
A figure that should have an interval and has none was not measured well enough to pass anything.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal
from xml.etree import ElementTree

from perplexit.comparison.byte_comparison import ByteComparison
from perplexit.comparison.token_comparison import Comparison
from perplexit.errors import UsageError
from perplexit.metrics.estimate import Estimate
from perplexit.runs.measurement import plain_json

JudgedOn = Literal["interval", "value"]

# The targets that QEfficient's perplexity script prints: ppl x 1.001 (FP16), x 1.01 (MXFP6/MXINT8).
PRESETS = {"fp16": "ppl_ratio<=1.001", "mx": "ppl_ratio<=1.01"}
LOWER_BOUND = "only a lower bound is known, as the reference is known in part"
_GATE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one figure: `metric operator bound`."""

    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound:g}"

    def holds(self, figure: float) -> bool:
        """Tell whether a number lies on the right side."""
        return {
            "<=": figure <= self.bound,
            "<": figure < self.bound,
            ">=": figure >= self.bound,
            ">": figure > self.bound,
        }[self.operator]


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's outcome.

    judged:    the number that was held against the bound; None where nothing could be.
    judged_on: "interval"; "value" where that was asked for, or the figure never has an interval;
               "not measured" where it should have an interval and has none, or is not finite.
    end:       which end of the interval was judged, "low" or "high"; None for the value.
    why:       why a value was judged, or nothing could be.
    """

    gate: str
    passed: bool
    metric: str
    bound: float
    value: float
    low: float | None
    high: float | None
    judged: float | None
    judged_on: str
    end: str | None = None
    why: str = ""

    @property
    def says(self) -> str:
        """Return what was held against the bound: `high end 1.0228 > 1.01`, `not measured: …`."""
        if self.judged is None:
            return f"not measured: {self.why}"
        what = "value" if self.end is None else f"{self.end} end"
        sign = "<" if self.judged < self.bound else ">" if self.judged > self.bound else "="
        says = f"{what} {_apart(self.judged, self.bound)} {sign} {self.bound:g}"
        return f"{says} ({self.why})" if self.why else says

    def __str__(self) -> str:
        interval = (
            "" if self.low is None or self.high is None else f" [{self.low:.6g}, {self.high:.6g}]"
        )
        return (
            f"{'pass' if self.passed else 'FAIL'}  {self.gate}: {self.says}; "
            f"{self.metric} = {self.value:.6g}{interval}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values, every number finite or null."""
        plain: dict[str, Any] = plain_json(asdict(self) | {"says": self.says})
        return plain


def _apart(number: float, bound: float) -> str:
    """Return a number with as many digits as set it apart from the bound, six at least."""
    for digits in range(6, 18):
        shown = f"{number:.{digits}g}"
        if (float(shown) < bound) == (number < bound) and (float(shown) > bound) == (
            number > bound
        ):
            return shown
    return repr(number)


def parse_gate(text: str) -> Gate:
    """Return the gate that `METRIC<=NUMBER` or the name of a preset stands for.

    Raises UsageError where it is neither.
    """
    match = _GATE.fullmatch(PRESETS.get(text.strip(), text))
    try:
        if match is not None and math.isfinite(bound := float(match[3])):
            return Gate(match[1], match[2], bound)  # type: ignore[arg-type]
    except ValueError:
        pass
    raise UsageError(
        f"expected a gate such as 'ppl_ratio<=1.01' (one of <=, <, >=, > and a number) or a preset "
        f"({', '.join(PRESETS)}), got {text!r}"
    )


def judge(
    comparison: Comparison | ByteComparison,
    gates: Iterable[Gate],
    *,
    judged_on: JudgedOn = "interval",
) -> list[GateResult]:
    """Return each gate held against a comparison, in the order given.

    On the interval (the default) the bad end counts: the high end for `<=` and `<`, the low end
    for `>=` and `>`. A figure that never has an interval (a maximum, a percentile) is judged on its
    value, and the result says so. One that should have an interval and has none fails as not
    measured, unless the value was asked for; a figure that is not finite fails always.
    Raises UsageError for a metric that the comparison does not have.
    """
    figures = comparison.figures()
    results = []
    for gate in gates:
        figure = figures.get(gate.metric)
        if figure is None:
            raise UsageError(
                f"the gate {gate} asks for {gate.metric!r}, but this comparison has "
                f"{', '.join(sorted(figures))}; {_why_not(comparison)}"
            )
        results.append(_result(gate, figures, judged_on))
    return results


def _result(gate: Gate, figures: Mapping[str, Estimate], judged_on: JudgedOn) -> GateResult:
    figure = figures[gate.metric]
    judged, on, end, why = _number_to_judge(gate, _bounded(gate, figures), judged_on)
    return GateResult(
        gate=str(gate),
        passed=judged is not None and gate.holds(judged),
        metric=gate.metric,
        bound=gate.bound,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        judged=judged,
        judged_on=on,
        end=end,
        why=why,
    )


def _bounded(gate: Gate, figures: Mapping[str, Estimate]) -> Estimate:
    """Return the estimate that an upper bound must hold for.

    Where a part of the reference is known, the divergences are lower bounds: the KL has an upper
    one beside it (`mean_kl_high`), and the others have none.
    """
    figure = figures[gate.metric]
    if gate.operator not in ("<=", "<") or "mean_kl_high" not in figures:
        return figure
    if gate.metric.endswith(("_reverse_kl", "_js")):
        return replace(figure, high=None, method="token", reason=LOWER_BOUND)
    return figures.get(f"{gate.metric}_high", figure)


def _number_to_judge(
    gate: Gate, figure: Estimate, judged_on: JudgedOn
) -> tuple[float | None, str, str | None, str]:
    """Return (the number, what it is, which end of the interval, why it is not an interval's)."""
    if not math.isfinite(figure.value):
        return None, "not measured", None, "the figure is not a finite number"
    if judged_on == "value" and figure.reason != LOWER_BOUND:
        return figure.value, "value", None, "the value was asked for"
    if not figure.should_have_interval:
        return figure.value, "value", None, "this figure never has an interval"
    name = "high" if gate.operator in ("<=", "<") else "low"
    end = figure.high if name == "high" else figure.low
    if end is None:
        reason = figure.reason or "it has no interval"
        if reason != LOWER_BOUND:
            reason += " (--gate-on value judges the value alone)"
        return None, "not measured", None, reason
    if not math.isfinite(end):
        return None, "not measured", None, f"the {name} end is not a finite number"
    return end, "interval", name, ""


def _why_not(comparison: Comparison | ByteComparison) -> str:
    if isinstance(comparison, ByteComparison):
        return (
            "the two runs were tokenised or cut differently and are compared byte by byte, where "
            "figures a token say nothing: gate on bits_per_byte_ratio, or evaluate both on one "
            "input"
        )
    return "KL and agreement need a run made with --reference"


def junit_xml(results_by_candidate: dict[str, list[GateResult]]) -> str:
    """Return the gates as a JUnit test report: a suite a candidate, a test case a gate."""
    root = ElementTree.Element("testsuites", name="perplexit compare")
    for candidate, results in results_by_candidate.items():
        failures = sum(not result.passed for result in results)
        suite = ElementTree.SubElement(
            root, "testsuite", name=candidate, tests=str(len(results)), failures=str(failures)
        )
        for result in results:
            case = ElementTree.SubElement(
                suite, "testcase", classname=candidate, name=result.gate, time="0"
            )
            if not result.passed:
                failure = ElementTree.SubElement(case, "failure", message=str(result))
                failure.text = str(result)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(results_by_candidate: dict[str, list[GateResult]]) -> str:
    """Return the gates as a Markdown table, for a CI job's summary."""
    lines = ["| candidate | gate | value | interval | judged | |", "|---|---|---|---|---|---|"]
    for candidate, results in results_by_candidate.items():
        for result in results:
            interval = (
                "–"
                if result.low is None or result.high is None
                else f"{result.low:.6g} … {result.high:.6g}"
            )
            mark = "pass" if result.passed else "**FAIL**"
            name, says = (text.replace("|", "\\|") for text in (candidate, result.says))
            lines.append(
                f"| {name} | `{result.gate}` | {result.value:.6g} | {interval} | {says} | {mark} |"
            )
    return "\n".join(lines) + "\n"

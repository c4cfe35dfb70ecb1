"""Gates: bounds that a comparison must hold, judged on the interval's bad end.

`ppl_ratio<=1.01` passes when the upper end of the ratio's interval is at most 1.01: a candidate
passes when the measurement shows that it is good enough, not when it fails to show that it is bad.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal
from xml.etree import ElementTree

from perplexit.comparison.byte_aligned import ByteComparison
from perplexit.comparison.record import Comparison
from perplexit.errors import UsageError

JudgedOn = Literal["interval", "value"]

# The targets that QEfficient's perplexity script prints: ppl x 1.001 (FP16), x 1.01 (MXFP6/MXINT8).
PRESETS = {"fp16": "ppl_ratio<=1.001", "mx": "ppl_ratio<=1.01"}
_GATE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one figure: `metric operator bound`."""

    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound:g}"

    def holds(self, figure: float) -> bool:
        """Whether a number lies on the right side."""
        return {
            "<=": figure <= self.bound,
            "<": figure < self.bound,
            ">=": figure >= self.bound,
            ">": figure > self.bound,
        }[self.operator]


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's outcome; `judged` is the number that was held against the bound."""

    gate: str
    passed: bool
    metric: str
    bound: float
    value: float
    low: float | None
    high: float | None
    judged: float
    judged_on: str  # "interval", or "value" where asked for or where there is no interval

    def __str__(self) -> str:
        interval = (
            "" if self.low is None or self.high is None else f" [{self.low:.6g}, {self.high:.6g}]"
        )
        return (
            f"{'pass' if self.passed else 'FAIL'}  {self.gate}: "
            f"{self.metric} = {self.value:.6g}{interval}"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)


def parse_gate(text: str) -> Gate:
    """The gate that `METRIC<=NUMBER` or the name of a preset stands for.

    Raises UsageError where it is neither.
    """
    match = _GATE.fullmatch(PRESETS.get(text.strip(), text))
    try:
        if match is not None:
            return Gate(match[1], match[2], float(match[3]))  # type: ignore[arg-type]
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
    """Each gate held against a comparison, in the order given.

    On the interval (the default) the bad end counts: the high end for `<=` and `<`, the low end
    for `>=` and `>`. A figure without an interval is judged on its value, and the result says so.
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
        end = figure.high if gate.operator in ("<=", "<") else figure.low
        on_interval = judged_on == "interval" and end is not None
        judged = end if on_interval and end is not None else figure.value
        results.append(
            GateResult(
                gate=str(gate),
                passed=gate.holds(judged),
                metric=gate.metric,
                bound=gate.bound,
                value=figure.value,
                low=figure.low,
                high=figure.high,
                judged=judged,
                judged_on="interval" if on_interval else "value",
            )
        )
    return results


def _why_not(comparison: Comparison | ByteComparison) -> str:
    if isinstance(comparison, ByteComparison):
        return (
            "the two runs were tokenised or cut differently and are compared byte by byte, where "
            "figures a token say nothing: gate on bits_per_byte_ratio, or evaluate both on one "
            "input"
        )
    return "KL and agreement need a run made with --reference"


def junit_xml(results_by_candidate: dict[str, list[GateResult]]) -> str:
    """The gates as a JUnit test report: a suite a candidate, a test case a gate."""
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
    """The gates as a Markdown table, for a CI job's summary."""
    lines = ["| candidate | gate | value | interval | |", "|---|---|---|---|---|"]
    for candidate, results in results_by_candidate.items():
        for result in results:
            interval = (
                "–"
                if result.low is None or result.high is None
                else f"{result.low:.6g} … {result.high:.6g}"
            )
            mark = "pass" if result.passed else "**FAIL**"
            name = candidate.replace("|", "\\|")
            lines.append(f"| {name} | `{result.gate}` | {result.value:.6g} | {interval} | {mark} |")
    return "\n".join(lines) + "\n"

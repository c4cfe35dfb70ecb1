"""Compare runs over one text: paired ratio, interval, verdict, divergences, gates, ranking."""

from perplexit.comparison.compare_by_token import compare
from perplexit.comparison.compare_several import ComparedRuns, RankedRun, compare_runs, ranked
from perplexit.comparison.gates import Gate, GateResult, judge, junit_xml, markdown, parse_gate
from perplexit.comparison.token_comparison import ChangedToken, Comparison, DomainRatio
from perplexit.comparison.verdicts import VERDICTS, Verdict

__all__ = [
    "VERDICTS",
    "ChangedToken",
    "ComparedRuns",
    "Comparison",
    "DomainRatio",
    "Gate",
    "GateResult",
    "RankedRun",
    "Verdict",
    "compare",
    "compare_runs",
    "judge",
    "junit_xml",
    "markdown",
    "parse_gate",
    "ranked",
]

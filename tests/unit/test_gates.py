"""Gates: what passes, what fails, and on which end of the interval."""

from xml.etree import ElementTree

import pytest

from perplexit.comparison.gates import Gate, judge, junit_xml, markdown, parse_gate
from perplexit.comparison.token_comparison import Comparison
from perplexit.errors import UsageError


def comparison(ratio: float, low: float | None, high: float | None) -> Comparison:
    return Comparison(
        verdict="worse",
        perplexity_reference=10.0,
        perplexity_candidate=10.0 * ratio,
        log_perplexity_difference=0.01,
        log_perplexity_difference_low=0.005,
        log_perplexity_difference_high=0.015,
        ppl_ratio=ratio,
        ppl_ratio_low=low,
        ppl_ratio_high=high,
        num_tokens=1000,
        num_unpaired=0,
        max_abs_nll_difference=0.5,
        mean_abs_nll_difference=0.02,
        confidence=0.95,
        interval_method="document",
        num_clusters=20,
        margin=1e-5,
        input_fingerprint="f",
        reference={"model": {}, "session": {}},
        candidate={"model": {}, "session": {}},
    )


def test_the_bad_end_of_the_interval_decides() -> None:
    measured = comparison(1.005, 0.998, 1.012)
    on_interval = judge(measured, [parse_gate("ppl_ratio<=1.01")])[0]
    assert not on_interval.passed
    assert on_interval.judged == 1.012
    assert judge(measured, [parse_gate("ppl_ratio<=1.01")], judged_on="value")[0].passed
    lower = judge(measured, [parse_gate("ppl_ratio >= 1.0")])[0]
    assert (lower.passed, lower.judged) == (False, 0.998)


def test_a_figure_that_never_has_an_interval_is_judged_on_its_value_and_says_so() -> None:
    result = judge(comparison(1.0, None, None), [parse_gate("max_abs_nll_difference<=0.5")])[0]
    assert (result.passed, result.judged_on, result.judged) == (True, "value", 0.5)
    assert "never has an interval" in str(result)


def test_presets_are_the_seeds_targets() -> None:
    assert parse_gate("fp16") == Gate("ppl_ratio", "<=", 1.001)
    assert parse_gate("mx") == Gate("ppl_ratio", "<=", 1.01)


@pytest.mark.parametrize("text", ["ppl_ratio", "ppl_ratio=1", "<=1", "ppl_ratio<=one", "fp17", ""])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a gate such as"):
        parse_gate(text)


def test_an_unknown_figure_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"mean_kl.*ppl_ratio.*--reference"):
        judge(comparison(1, 1, 1), [parse_gate("mean_kl<=0.1")])


def test_reports_for_ci_name_the_gate_the_figure_and_the_interval() -> None:
    results = {
        "good": judge(comparison(1.0, 0.999, 1.0005), [parse_gate("fp16")]),
        "bad | <one>": judge(comparison(1.1, 1.05, 1.15), [parse_gate("mx"), parse_gate("fp16")]),
    }
    root = ElementTree.fromstring(junit_xml(results))
    suites = {suite.get("name"): suite for suite in root}
    assert suites["good"].get("failures") == "0"
    assert suites["bad | <one>"].get("failures") == "2"
    failure = suites["bad | <one>"].find("testcase/failure")
    assert "ppl_ratio = 1.1 [1.05, 1.15]" in failure.get("message")
    table = markdown(results).splitlines()
    assert len(table) == 5
    assert "**FAIL**" in table[3]
    assert "\\|" in table[3]
    assert results["good"][0].to_json()["passed"] is True

"""C2, C3 and F: four verdicts with a margin, gates on what was measured, ties, and whole lines."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli import demo, output
from perplexit.cli.app import app
from perplexit.comparison import VERDICTS, Comparison, compare_runs, judge, parse_gate
from perplexit.comparison.byte_comparison import ByteComparison
from perplexit.comparison.compare_by_byte import compare_bytes
from perplexit.comparison.verdict_sentences import Judged, changed_predictions
from perplexit.comparison.verdicts import Margin, margin_of, resolution_of, share_of, verdict_of
from perplexit.errors import UsageError
from perplexit.metrics.estimate import Estimate, quantity
from perplexit.metrics.intervals import clusters_for, mean_interval
from perplexit.report.headlines import findings_of, headline
from perplexit.report.labelled_runs import LabelledRuns
from perplexit.runs.run import Run
from tests.report_runs import shifted, toy_runs, with_kl
from tests.toy_sessions import BigramSession

TEXTS = [f"Document {n} says that a margin is asked for, and not assumed. " * 3 for n in range(24)]


@pytest.fixture(scope="module")
def runs(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """24 documents: `full`, a worse one, and one that differs by rounding."""
    folder = tmp_path_factory.mktemp("verdicts")
    return toy_runs(folder, TEXTS, byte_tokenizer_json, noises=(1.0, 1e-7))


@pytest.fixture(scope="module")
def one_window(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A text of one window: nothing in it has an interval."""
    folder = tmp_path_factory.mktemp("one")
    return toy_runs(folder, ["Too short."], byte_tokenizer_json, noises=(1.0,))


def estimate(low: float | None, value: float, high: float | None, **more: Any) -> Estimate:
    return Estimate(value, low, high, "document", 24, 0.95, **more)


def judged(found: Estimate, margin: float = 1e-5, asked: float = 0.0, **more: Any) -> Judged:
    allowed = Margin(max(margin, math.log1p(asked)), asked, {})
    return Judged(found, allowed, **({"unit": "token", "num_units": 422} | more))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


# C3: the four verdicts


def test_c3_an_interval_that_crosses_the_noise_floor_is_inconclusive() -> None:
    """Noise floor 1e-3, interval [1e-6, 1.1e-3]: it was called "worse"."""
    found = judged(estimate(1e-6, 5.5e-4, 1.1e-3), margin=1e-3)
    assert found.verdict == "inconclusive"
    says = plain(found.sentence())
    assert "higher perplexity than the reference, perhaps by less than the margin" in says
    assert "the noise floor, 0.10 %" in says


def test_c3_an_inconclusive_headline_names_kl_and_agreement(runs: list[Run]) -> None:
    """nf4's case: wide interval around 1, and predictions that moved without doubt."""
    candidate = with_kl(shifted(runs[0], 0.18, spread=1.0), runs[0], scale=0.3)
    labelled = LabelledRuns.of([runs[0], candidate], labels=["fp32", "nf4"])
    comparison = labelled.comparisons[0]
    assert comparison.verdict == "inconclusive"
    assert comparison.ppl_ratio_low < 1 < comparison.ppl_ratio_high
    kl = candidate.tokens.kl.mean(dtype=np.float64)
    same = 100 * candidate.tokens.same_top1.mean()
    says = plain(headline(labelled))
    assert says.startswith(
        f"nf4 cannot be told from fp32 by perplexity on {comparison.num_tokens:,} tokens, "
        f"but KL is {kl:.3f}"[:-1]
    )
    assert f"the first choice is the same at {same:.0f} %" in says
    assert f"perplexity ratio {comparison.ppl_ratio:.3f} [{comparison.ppl_ratio_low:.3f}," in says
    assert "but KL is" in str(comparison)
    assert "but KL is" in comparison.to_json()["sentence"]


def test_c3_with_a_margin_the_same_runs_are_equivalent(runs: list[Run]) -> None:
    candidate = shifted(runs[0], 0.002, spread=0.003)
    without = px.compare(runs[0], candidate)
    assert without.verdict in ("worse", "inconclusive")
    for margin in ("1%", "1 %", 0.01, "0.01"):
        within = px.compare(runs[0], candidate, margin=margin)
        assert within.verdict == "equivalent"
        assert within.margin == pytest.approx(math.log(1.01), rel=1e-12)
        assert "equivalent to the reference within 1 %" in plain(within.sentence)
    document = within.to_json()
    assert (document["verdict"], document["margin_asked"]) == ("equivalent", 0.01)
    assert set(document["noise_floor"]) == {"given", "reference", "candidate"}


def test_c3_worse_needs_more_than_the_margin(runs: list[Run]) -> None:
    candidate = shifted(runs[0], 0.008, spread=0.001)
    assert px.compare(runs[0], candidate).verdict == "worse"
    assert px.compare(runs[0], candidate, margin="0.2%").verdict == "worse"
    crossing = px.compare(runs[0], candidate, margin="0.8%")
    assert crossing.verdict == "inconclusive"
    assert "perhaps by less than the margin (0.8 %)" in plain(crossing.sentence)
    assert px.compare(runs[0], candidate, margin="5%").verdict == "equivalent"
    assert px.compare(candidate, runs[0]).verdict == "better"


def test_c3_an_inconclusive_verdict_says_what_would_decide_it(runs: list[Run]) -> None:
    candidate = shifted(runs[0], 0.001, spread=0.03)
    comparison = px.compare(runs[0], candidate)
    low, high = comparison.log_perplexity_difference_low, comparison.log_perplexity_difference_high
    half = (high - low) / 2
    found = comparison.to_json()["resolution"]
    assert found["half_width"] == pytest.approx(half)
    assert found["smallest_shown"] == pytest.approx(half + 1e-5)
    expected = (half / (comparison.log_perplexity_difference - 1e-5)) ** 2
    assert found["text_factor"] == pytest.approx(expected)
    says = plain(comparison.sentence)
    assert f"a difference of {quantity(100 * math.expm1(half + 1e-5))} % or more" in says
    assert f"about {expected:,.0f} times as much text would decide it" in says
    assert "--margin 2% they would count as equivalent" in says or "--margin 5%" in says


@given(
    value=st.floats(-0.1, 0.1),
    half=st.floats(1e-6, 0.5),
    margin=st.sampled_from([1e-5, 1e-3, math.log1p(0.01)]),
)
def test_c3_the_text_that_is_asked_for_decides(value: float, half: float, margin: float) -> None:
    """With the interval narrowed by the root of the factor, the verdict is one of the three."""
    before = estimate(value - half, value, value + half)
    found = resolution_of(before, margin)
    assert found is not None
    if verdict_of(before, margin) != "inconclusive" or found.text_factor is None:
        return

    def with_text(factor: float) -> str:
        narrow = half / math.sqrt(factor)
        return verdict_of(estimate(value - narrow, value, value + narrow), margin)

    assert found.text_factor >= 1 - 1e-9
    assert with_text(found.text_factor * 1.01) != "inconclusive"
    assert with_text(found.text_factor * 0.99) == "inconclusive"


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(1e-5, 0.5))
def test_c3_every_interval_has_one_verdict(one: float, other: float, margin: float) -> None:
    low, high = sorted((one, other))
    rules = {
        "worse": low > margin,
        "better": high < -margin,
        "equivalent": -margin <= low and high <= margin,
    }
    holds = [verdict for verdict, rule in rules.items() if rule] or ["inconclusive"]
    assert [verdict_of(estimate(low, (low + high) / 2, high), margin)] == holds


@pytest.mark.parametrize(("truth", "wrong"), [(0.01, "equivalent"), (0.01, "worse"), (0, "better")])
def test_c3_sibling_a_verdict_is_as_rarely_wrong_as_promised(truth: float, wrong: str) -> None:
    """2,000 texts of 40 documents: where the truth is on the border, each side has 2.5 %."""
    random = np.random.default_rng(5)
    clusters = clusters_for(np.repeat(np.arange(40), 30), np.repeat(np.arange(40), 30))
    margin = 0.01 if truth else 1e-5
    count = 0
    for _ in range(2000):
        own_D = random.normal(truth, 0.01, 40)
        delta_M = np.repeat(own_D, 30) + random.normal(0, 0.02, 1200)
        found = mean_interval(delta_M, clusters)
        count += verdict_of(found, margin) == wrong
    assert 0.012 <= count / 2000 <= 0.038


def test_c3_sibling_a_run_against_itself(runs: list[Run], one_window: list[Run]) -> None:
    same = px.compare(runs[0], runs[0])
    assert same.verdict == "equivalent"
    assert same.sentence.startswith("The candidate has the same loss as the reference on every")
    short = px.compare(one_window[0], one_window[0])
    assert short.verdict == "inconclusive"
    assert "nothing is claimed for another text" in short.sentence


def test_c3_sibling_without_an_interval_nothing_is_claimed(one_window: list[Run]) -> None:
    comparison = px.compare(*one_window, margin="50%")
    assert (comparison.verdict, comparison.ppl_ratio_low) == ("inconclusive", None)
    assert "Nothing is claimed" in comparison.sentence
    assert comparison.to_json()["resolution"] is None
    assert comparison.reasons["ppl_ratio_low"] in str(comparison)


def test_c3_sibling_an_interval_without_width_counts(runs: list[Run]) -> None:
    """Every loss is higher by the same: the interval is a point, and tells."""
    exact = shifted(runs[0], 0.25)
    comparison = px.compare(runs[0], exact)
    assert comparison.verdict == "worse"
    assert px.compare(runs[0], exact, margin="50%").verdict == "equivalent"


def test_c3_sibling_byte_by_byte_the_same_rule(
    runs: list[Run], byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    tokens = px.prepare(
        TEXTS, tokenizer=byte_tokenizer_json, max_length=48, output=tmp_path / "in.safetensors"
    )
    other = px.evaluate(BigramSession(400, seed=0), tokens)
    floored = replace(other, noise_floor={"nats_a_token": 0.02})
    for margin, expected in (("1%", math.log(1.01)), (0, 1e-5)):
        found = compare_bytes(runs[0], other, margin=margin)
        assert found.margin == pytest.approx(expected)
        interval = estimate(found.log_difference_low, 0.0, found.log_difference_high)
        assert found.verdict == verdict_of(interval, found.margin)
        assert found.to_json()["sentence"] in str(found)
    found = compare_bytes(runs[0], floored)
    per_byte = 0.02 * other.num_tokens / other.num_bytes
    assert found.margin == pytest.approx(per_byte)
    assert found.noise_floor == {"given": 0.0, "reference": None, "candidate": found.margin}


def test_c3_sibling_each_domain_has_a_verdict(byte_tokenizer_json: Path, tmp_path: Path) -> None:
    rows = [
        {"text": text, "kind": kind} for text in TEXTS for kind in ("harmed", "kept", "changing")
    ]
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("\n".join(json.dumps(row) for row in rows))
    tokens = px.prepare(
        corpus,
        tokenizer=byte_tokenizer_json,
        domain_key="kind",
        max_length=64,
        output=tmp_path / "in.safetensors",
    )
    run = px.evaluate(BigramSession(), tokens, run=tmp_path / "run")
    code = {name: run.tokens.domains.index(name) for name in ("harmed", "kept", "changing")}
    random = np.random.default_rng(0)
    nll = run.tokens.nll.copy()
    nll += np.where(run.tokens.domain == code["harmed"], 0.1, 0.0).astype(np.float32)
    own_D = random.normal(0, 0.2, 3 * len(TEXTS)).astype(np.float32)
    nll += np.where(run.tokens.domain == code["changing"], own_D[run.tokens.document], 0)
    candidate = replace(run, loaded_tokens=run.tokens.with_columns(nll=nll))
    comparison = px.compare(run, candidate, margin="1%")
    verdicts = {row.domain: row.verdict for row in comparison.domains}
    assert verdicts == {"harmed": "worse", "kept": "equivalent", "changing": "inconclusive"}
    assert "harmed: ratio 1.10517" in str(comparison)
    page = px.write_report([run, candidate], tmp_path / "r.html", margin="1%").path.read_text()
    section = page[page.index('id="domains-title"') : page.index('id="charts"')]
    for verdict in verdicts.values():
        assert f'class="badge {verdict}"' in section


def test_c3_sibling_kl_that_is_storage_noise_is_not_named() -> None:
    small = {"mean_kl": estimate(1e-7, 2e-7, 3e-7), "top1_agreement": estimate(1.0, 1.0, 1.0)}
    assert changed_predictions(small, 0.0) == ""
    stored = {"mean_kl": estimate(2e-5, 3e-5, 4e-5)}
    assert changed_predictions(stored, 1e-4) == ""
    assert changed_predictions(stored, 1e-6) == "KL is 3e-05 [2e-05, 4e-05]"
    one_flip = {"top1_agreement": estimate(0.99985, 0.9999, 0.99995)}
    assert plain(changed_predictions(one_flip, 0.0)).endswith("same at 99.99 % of the tokens")


def test_c3_sibling_a_difference_within_the_margin_says_its_side() -> None:
    says = plain(judged(estimate(0.012, 0.017, 0.022), asked=0.05).sentence())
    assert says.startswith("The candidate is equivalent to the reference within 5 %.")
    assert "It is higher, but by less than that" in says


@pytest.mark.parametrize("margin", ["1", "100%", "-1%", "nan", "one", "", "inf", "1%%", 1.5, -0.1])
def test_c3_sibling_what_is_no_margin_is_refused(margin: Any, runs: list[Run]) -> None:
    with pytest.raises(UsageError, match=r"1%, or a share such as 0\.01"):
        px.compare(runs[0], runs[1], margin=margin)


@given(st.floats(0, 0.999))
def test_c3_sibling_a_margin_is_the_same_in_both_spellings(share: float) -> None:
    assert share_of(share) == share
    assert share_of(f"{100 * share!r}%") == pytest.approx(share, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("floor", [None, {}, {"nats_a_token": None}, {"nats_a_token": math.nan}])
def test_c3_sibling_a_noise_floor_that_is_no_number_decides_nothing(
    runs: list[Run], floor: dict[str, Any] | None
) -> None:
    run = replace(runs[0], noise_floor=floor)
    found = margin_of(run, runs[1], noise_floor=0.0, margin=0, per_byte=False)
    assert (found.nats, found.noise["reference"]) == (1e-5, None)


def test_c3_several_candidates_in_one_sentence(runs: list[Run], tmp_path: Path) -> None:
    unsure = shifted(runs[0], 0.0005, spread=0.5)
    worse, better, same = shifted(runs[0], 0.1), shifted(runs[0], -0.1), runs[2]
    labels = ["full", "worse", "unsure", "same", "better"]
    labelled = LabelledRuns.of([runs[0], worse, unsure, same, better], labels=labels)
    assert headline(labelled) == (
        "Of 4 candidates against full, 1 is worse, 1 better, 1 equivalent and 1 inconclusive."
    )
    assert [finding.kind for finding in findings_of(labelled)] == [
        "worse",
        "inconclusive",
        "equivalent",
        "better",
    ]
    moved = with_kl(unsure, runs[0], scale=0.2)
    none = LabelledRuns.of([runs[0], unsure, moved], labels=["full", "a", "b"])
    assert headline(none) == (
        "None of 2 candidates can be told from full by perplexity, but the predictions of 1 did "
        "change."
    ) or headline(none).endswith("but the predictions of all of them did change.")
    page = px.write_report(
        [runs[0], worse, unsure, same, better], tmp_path / "r.html", labels=labels, margin="0.5%"
    ).path.read_text("utf-8")
    assert "The dotted lines are the margin of 0.5 %" in plain(page)
    for verdict in VERDICTS:
        assert f'class="finding {verdict}"' in page
        assert f'class="badge {verdict}"' in page


# C2: gates and ranking


def gate_lines(comparison: Comparison | ByteComparison, *gates: str, **options: Any) -> list[str]:
    return [str(result) for result in judge(comparison, map(parse_gate, gates), **options)]


def test_c2_a_gate_without_an_interval_is_not_measured(one_window: list[Run]) -> None:
    comparison = px.compare(*one_window)
    assert comparison.ppl_ratio < 1000
    for gate in ("ppl_ratio<=1000", "log_perplexity_difference<9", "mean_abs_nll_difference<=99"):
        (result,) = judge(comparison, [parse_gate(gate)])
        assert (result.passed, result.judged, result.judged_on) == (False, None, "not measured")
        assert "not measured" in str(result)
        (asked,) = judge(comparison, [parse_gate(gate)], judged_on="value")
        assert (asked.passed, asked.judged_on) == (True, "value")
    assert gate_lines(comparison, "max_abs_nll_difference<=99")[0].startswith("pass")


def test_c2_the_outcome_is_the_same_in_every_output(one_window: list[Run], tmp_path: Path) -> None:
    files = ["--junit", str(tmp_path / "g.xml"), "--markdown", str(tmp_path / "g.md")]
    words = ["compare", *(str(run.folder) for run in one_window), "--gate", "ppl_ratio<=1000"]
    result = CliRunner().invoke(app, [*words, *files, "--json"])
    assert result.exit_code == 3
    (gate,) = json.loads(result.stdout)["gates"]
    assert (gate["passed"], gate["judged"], gate["judged_on"]) == (False, None, "not measured")
    failure = ElementTree.parse(tmp_path / "g.xml").getroot().find("testsuite/testcase/failure")
    assert "not measured" in failure.get("message")
    assert "not measured" in (tmp_path / "g.md").read_text("utf-8")
    assert "not measured" in result.stderr
    assert CliRunner().invoke(app, [*words, "--gate-on", "value"]).exit_code == 0


def test_c2_presets_are_not_passed_by_a_text_that_is_too_short(one_window: list[Run]) -> None:
    same = px.compare(one_window[0], one_window[0])
    for preset in ("fp16", "mx"):
        assert not judge(same, [parse_gate(preset)])[0].passed
        assert judge(same, [parse_gate(preset)], judged_on="value")[0].passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operator", ["<=", "<", ">=", ">"])
def test_c2_sibling_what_is_not_finite_never_passes(
    runs: list[Run], value: float, operator: str
) -> None:
    comparison = replace(
        px.compare(runs[0], runs[1]), ppl_ratio=value, max_abs_nll_difference=value
    )
    for metric in ("ppl_ratio", "max_abs_nll_difference"):
        for on in ("interval", "value"):
            (result,) = judge(comparison, [parse_gate(f"{metric}{operator}1")], judged_on=on)
            assert not result.passed
            json.dumps(result.to_json(), allow_nan=False)


def test_c2_sibling_a_bound_that_is_not_finite_is_no_gate() -> None:
    for text in ("ppl_ratio<=1e999", "ppl_ratio>=-1e999"):
        with pytest.raises(UsageError, match="expected a gate"):
            parse_gate(text)


def test_c2_sibling_agreement_from_alternatives_has_an_interval(runs: list[Run]) -> None:
    """No KL was measured: first choices come from `--top-k`, and the gate judges the low end."""
    comparison = px.compare(runs[0], runs[1])
    assert comparison.divergences is None
    figure = comparison.figures()["top1_agreement"]
    same = runs[0].tokens.top_ids[:, 0] == runs[1].tokens.top_ids[:, 0]
    assert figure.value == pytest.approx(same.mean(), abs=1e-12)
    per_document = [same[runs[0].tokens.document == d] for d in range(len(TEXTS))]
    counts = np.array([len(part) for part in per_document])
    sums = np.array([part.sum() for part in per_document])
    shares = (sums - figure.value * counts) / counts.sum() / (1 - counts / counts.sum())
    error = math.sqrt((len(counts) - 1) / len(counts) * (shares**2).sum())
    assert figure.standard_error == pytest.approx(error)
    bound = (figure.low + figure.value) / 2
    gate = f"top1_agreement>={bound!r}"
    assert not judge(comparison, [parse_gate(gate)])[0].passed
    assert judge(comparison, [parse_gate(gate)], judged_on="value")[0].passed


def test_c2_sibling_percentiles_and_maxima_are_judged_on_their_value(runs: list[Run]) -> None:
    comparison = px.compare(runs[0], with_kl(runs[1], runs[0]))
    for metric in ("p99.9_kl", "max_kl", "median_kl", "rms_kl", "max_abs_nll_difference"):
        (result,) = judge(comparison, [parse_gate(f"{metric}<=100")])
        assert (result.passed, result.judged_on) == (True, "value")
        assert "never has an interval" in str(result)


def test_c2_sibling_a_lower_bound_passes_no_upper_gate(runs: list[Run]) -> None:
    """A reference that is known in part: KL has a bound on either side, the others one below."""
    known = with_kl(runs[1], runs[0])
    columns = known.tokens
    columns = columns.with_columns(kl_high=columns.kl + 1, reverse_kl=columns.kl, js=columns.kl / 4)
    comparison = px.compare(runs[0], replace(known, loaded_tokens=columns))
    for on in ("interval", "value"):
        for metric in ("mean_kl", "max_kl", "p99.9_kl", "median_kl", "rms_kl"):
            (lower,) = judge(comparison, [parse_gate(f"{metric}<=0.5")], judged_on=on)
            assert (lower.passed, lower.judged > 1) == (False, True), metric
            assert judge(comparison, [parse_gate(f"{metric}<=9")], judged_on=on)[0].passed
        for metric in ("mean_js", "max_reverse_kl", "p99_js"):
            (unknown,) = judge(comparison, [parse_gate(f"{metric}<=9")], judged_on=on)
            assert not unknown.passed
            assert "only a lower bound is known" in str(unknown)
            assert judge(comparison, [parse_gate(f"{metric}>=0")], judged_on=on)[0].passed


def test_c2_sibling_bytes_have_gates_on_intervals_too(
    runs: list[Run], byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    tokens = px.prepare(
        TEXTS, tokenizer=byte_tokenizer_json, max_length=48, output=tmp_path / "in.safetensors"
    )
    comparison = compare_bytes(runs[0], px.evaluate(BigramSession(400, seed=0), tokens))
    for metric, figure in comparison.figures().items():
        assert figure.low <= figure.value <= figure.high, metric
        (result,) = judge(comparison, [parse_gate(f"{metric}<={figure.value!r}")])
        assert result.judged_on == "interval"


def test_c2_ranking_follows_confidence_noise_floor_and_margin(runs: list[Run]) -> None:
    reference = runs[0]
    close = shifted(reference, 0.004, spread=0.018, seed=1)
    candidates = [reference, close]

    def ranks(**options: Any) -> list[int]:
        return compare_runs(reference, candidates, **options).ranks

    comparison = px.compare(reference, close)
    low, high = comparison.log_perplexity_difference_low, comparison.log_perplexity_difference_high
    assert low < 1e-5 < high
    assert ranks() == [1, 1]
    assert ranks(confidence=0.5) == [1, 2]
    assert ranks(confidence=0.5, noise_floor=0.02) == [1, 1]
    assert ranks(confidence=0.5, margin="2%") == [1, 1]


def test_c2_sibling_ties_are_ties_for_inconclusive_and_equivalent(runs: list[Run]) -> None:
    unsure = shifted(runs[0], 0.0003, spread=0.4)
    found = compare_runs(runs[0], [runs[2], unsure, shifted(runs[0], 0.5)])
    assert [c.verdict for c in found.comparisons] == ["equivalent", "inconclusive", "worse"]
    assert found.ranks == [1, 1, 3]
    assert "a shared place is a tie" in str(found)


# F: the gate's line names the end that failed; nothing is cut off


def test_f_the_gate_names_the_end_that_failed(runs: list[Run]) -> None:
    comparison = replace(
        px.compare(runs[0], runs[1]), ppl_ratio=1.0171, ppl_ratio_low=1.0115, ppl_ratio_high=1.0228
    )
    (line,) = gate_lines(comparison, "ppl_ratio<=1.01")
    assert line == (
        "FAIL  ppl_ratio<=1.01: high end 1.0228 > 1.01; ppl_ratio = 1.0171 [1.0115, 1.0228]"
    )
    (line,) = gate_lines(comparison, "ppl_ratio>=1.012")
    assert "low end 1.0115 < 1.012" in line
    (line,) = gate_lines(comparison, "ppl_ratio<=1.03")
    assert line.startswith("pass  ppl_ratio<=1.03: high end 1.0228 < 1.03;")


def test_f_sibling_an_end_a_hair_beyond_the_bound_is_not_rounded_onto_it(runs: list[Run]) -> None:
    comparison = replace(
        px.compare(runs[0], runs[1]), ppl_ratio=1.0, ppl_ratio_low=1.0, ppl_ratio_high=1.01 + 1e-12
    )
    (line,) = gate_lines(comparison, "ppl_ratio<=1.01")
    assert "high end 1.010000000001 > 1.01" in line
    (line,) = gate_lines(comparison, "ppl_ratio<1.010000000001")
    assert line.startswith("FAIL")


def terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> io.StringIO:
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, highlight=False)
    monkeypatch.setattr(output, "people", lambda: console)
    return shown


@pytest.mark.parametrize("width", [80, 100])
def test_f_lines_are_broken_between_words(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    unsure = with_kl(shifted(runs[0], 0.05, spread=0.4), runs[0], scale=0.3)
    text = str(px.compare(runs[0], unsure, num_most_changed=0))
    assert max(map(len, text.splitlines())) > width
    shown = terminal(monkeypatch, width)
    output.tell_wrapped(text)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(shown.getvalue().split()) == " ".join(text.split())
    follows = [line for line in lines if line.startswith(" " * 12)]
    assert follows


def test_f_sibling_a_name_with_colons_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`:star:` is a folder's name, and no picture of a star; `[bold]` is no mark-up."""
    name = "runs/:star:/[bold]x"
    shown = terminal(monkeypatch, 80)
    output.tell_wrapped(f"reference: {name}")
    assert shown.getvalue().strip() == f"reference: {name}"
    monkeypatch.undo()
    output.tell(name)
    assert capsys.readouterr().err.strip() == name


def test_f_when_piped_a_line_is_one_line(runs: list[Run]) -> None:
    result = CliRunner().invoke(
        app, ["compare", str(runs[0].folder), str(runs[1].folder), "--margin", "1%"]
    )
    assert result.exit_code == 0
    verdict = next(line for line in result.stderr.splitlines() if line.startswith("verdict:"))
    assert verdict.rstrip().endswith(".")
    assert px.compare(runs[0], runs[1], margin="1%").sentence in verdict


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_f_the_demos_table_cuts_nothing_off(width: int, verdict: str) -> None:
    run = SimpleNamespace(
        perplexity=24.56,
        perplexity_low=21.15,
        perplexity_high=28.52,
        bits_per_byte=1.034,
        num_tokens=7000,
        tokens_per_second=1007.0,
        peak_memory_bytes={"host_rss": 1755 * 2**20},
    )
    found = SimpleNamespace(
        verdict=verdict, ppl_ratio=1.05, ppl_ratio_low=1.04, ppl_ratio_high=1.06
    )
    scored: Any = [
        demo.Scored(way.name, run, comparison)  # type: ignore[arg-type]
        for way, comparison in zip(demo.WAYS, [None, found, found, found], strict=True)
    ]
    shown = io.StringIO()
    Console(width=width, file=shown).print(demo.table(scored))
    text = shown.getvalue()
    assert "…" not in text
    for part in (verdict, "[1.04000, 1.06000]", "[21.15, 28.52]", "1,755 MiB", "1,007/s"):
        assert part in text

"""The report's parts without a browser: data that comes back whole, words that say the figures."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perplexit as px
from perplexit.comparison.compared_tokens import exceedance
from perplexit.errors import FingerprintMismatchError, MissingPackageError, RunError, UsageError
from perplexit.metrics.estimate import decimals, figure, interval, quantity
from perplexit.report import chart_drawings
from perplexit.report import token_data as token_data_module
from perplexit.report.headlines import findings_of, headline
from perplexit.report.html_page import json_block
from perplexit.report.labelled_runs import LabelledRuns, labels_of
from perplexit.report.run_charts import agreement_rows, charts_of
from perplexit.report.run_tables import conditions_of, notes_of
from perplexit.report.token_data import CONTINUATION, GAP, PLAIN, packed, token_data
from perplexit.runs.run import Run
from tests.report_runs import toy_runs, with_kl

TEXTS = ["The loss of a token. " * 120, "日本語 🙂 Maß.\n" * 20, "Short, and scored."]
KINDS = {"u1": "<u1", "u2": "<u2", "u4": "<u4", "i2": "<i2", "i4": "<i4", "f4": "<f4", "f8": "<f8"}


@pytest.fixture(scope="module")
def runs(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return toy_runs(
        tmp_path_factory.mktemp("report"), TEXTS, byte_tokenizer_json, noises=(1.5, 1e-7)
    )


@pytest.fixture(scope="module")
def labelled(runs: list[Run]) -> LabelledRuns:
    return LabelledRuns.of(runs)


def unpacked(column: dict[str, Any]) -> np.ndarray:
    """What the page's script does."""
    values = np.frombuffer(base64.b64decode(column["data"]), KINDS[column["type"]])
    if "scale" not in column:
        return values
    return np.where(values == np.iinfo(values.dtype).max, np.nan, values / column["scale"])


@given(st.lists(st.integers(-(2**31), 2**32 - 1), max_size=20))
def test_integers_come_back(values: list[int]) -> None:
    if min(values, default=0) < 0 and max(values, default=0) >= 2**31:
        values = [v for v in values if v < 2**31]
    array = np.array(values, dtype=np.int64)
    assert unpacked(packed(array)).tolist() == values


@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(math.nan)), max_size=20))
def test_scaled_floats_come_back_to_a_thousandth(values: list[float]) -> None:
    back = unpacked(packed(np.array(values, dtype=np.float64), 1000.0))
    np.testing.assert_allclose(back, values, atol=5.001e-4, equal_nan=True)


@given(st.text())
def test_no_text_can_end_the_data_block(text: str) -> None:
    text = text.encode("utf-8", "replace").decode("utf-8", "replace")
    for hostile in (text, f"</script>{text}", f"<!--<script>{text}", f"\u2028{text}&amp;"):
        block = json_block({"text": hostile})
        assert not re.search("[<>&\u2028\u2029]", block)
        assert json.loads(block) == {"text": hostile}


def test_the_page_holds_every_token_with_its_numbers(labelled: LabelledRuns) -> None:
    tokens = px.TokenFile.open(str(labelled.reference.input_path))
    data = token_data(labelled, tokens=tokens, max_tokens=10**6, max_alternatives=3)
    assert data["numShown"] == data["numTokens"] == tokens.num_ids
    assert data["text"] == "".join(TEXTS)
    units = unpacked(data["units"])
    assert units.sum() == len("".join(TEXTS).encode("utf-16-le")) // 2
    rows = labelled.reference.tokens
    flat = tokens.document_starts[rows.document] + rows.token_index
    for run, shown in zip(labelled.runs, data["runs"], strict=True):
        nll = unpacked(shown["nll"])
        np.testing.assert_array_equal(nll[flat], run.tokens.nll)
        assert np.isnan(np.delete(nll, flat)).all()
        np.testing.assert_array_equal(unpacked(shown["rank"])[flat], run.tokens.rank)
        top = unpacked(shown["top"]["id"]).reshape(-1, 3)
        np.testing.assert_array_equal(top[flat], run.tokens.top_ids[:, :3])
        cost = unpacked(shown["top"]["nll"]).reshape(-1, 3)
        np.testing.assert_allclose(cost[flat], -run.tokens.top_logprobs[:, :3], atol=6e-4)
    kinds = unpacked(data["kind"])
    assert set(kinds) == {PLAIN, CONTINUATION}  # 🙂 is spelled by several tokens


def test_without_the_input_what_was_not_scored_is_a_gap(labelled: LabelledRuns) -> None:
    data = token_data(labelled, tokens=None, max_tokens=10**6, max_alternatives=0)
    kinds = unpacked(data["kind"])
    assert (kinds == GAP).sum() == len(TEXTS)  # each document's first token
    assert data["numTokens"] == len(labelled.reference.tokens) + len(TEXTS)
    assert "he loss of a token." in data["text"]
    assert all(run["top"] is None for run in data["runs"])


def test_the_page_is_cut_at_max_tokens_and_says_so(runs: list[Run], tmp_path: Path) -> None:
    report = px.write_report(runs[:2], tmp_path / "r.html", max_tokens=50)
    assert (report.num_tokens_shown, report.num_tokens > 500) == (50, True)
    page = report.path.read_text(encoding="utf-8")
    assert f"first 50 of {report.num_tokens:,} tokens" in page


def test_many_runs_over_much_text_keep_fewer_alternatives(
    labelled: LabelledRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = len(labelled.reference.tokens) + len(TEXTS)
    monkeypatch.setattr(token_data_module, "ALTERNATIVES_BYTES", tokens * 3 * 4 * 4 / 3 * 2.5)
    data = token_data(labelled, tokens=None, max_tokens=10**6, max_alternatives=5)
    assert [run["top"]["count"] for run in data["runs"]] == [2, 2, 2]


def test_the_first_sentence_says_the_comparison(labelled: LabelledRuns, runs: list[Run]) -> None:
    comparison = px.compare(runs[0], runs[1])
    assert comparison.verdict == "worse"
    pair = LabelledRuns.of(runs[:2])
    ratio = figure(comparison.ppl_ratio, comparison.ppl_ratio_low, comparison.ppl_ratio_high)
    assert headline(pair).startswith(f"noise-1.5 is worse than full: perplexity ratio {ratio} [")
    assert "more on average" in findings_of(pair)[0].detail
    swapped = headline(LabelledRuns.of([runs[1], runs[0]]))
    assert swapped.startswith("full is better than noise-1.5")
    same = LabelledRuns.of([runs[0], runs[2]])
    assert "is equivalent to full within the noise" in headline(same)
    assert headline(labelled) == "Of 2 candidates against full, 1 is worse and 1 equivalent."
    assert headline(LabelledRuns.of(runs[:1])).startswith("full has a perplexity of ")


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (1.0213, 1.0181, 1.0244, "1.0213 [1.0181, 1.0244]"),
        (18.301, 17.12, 19.57, "18.30 [17.12, 19.57]"),
        (1.00001, 0.99998, 1.00004, "1.000010 [0.999980, 1.000040]"),
        (2678.12, 2554.6, 2807.7, "2,678.1 [2,554.6, 2,807.7]"),
        (18.301, None, None, "18.30"),
        (None, None, None, "–"),
        (0.0, None, None, "0.000"),
    ],
)
def test_figures_have_the_digits_their_interval_carries(
    value: float | None, low: float | None, high: float | None, expected: str
) -> None:
    assert f"{figure(value, low, high)} {interval(low, high)}".strip() == expected


@given(st.floats(1e-9, 1e6))
def test_a_quantity_keeps_two_digits(value: float) -> None:
    assert float(quantity(value).replace(",", "")) == pytest.approx(value, rel=0.051)
    assert 1 <= decimals(value, None, None) <= 6


def test_labels_are_short_and_never_alike(runs: list[Run]) -> None:
    assert labels_of(runs) == ("full", "noise-1.5", "noise-1e-07")
    again = labels_of([runs[0], runs[0], runs[0]])
    assert len(set(again)) == 3
    in_memory = [replace(run, folder=None) for run in runs[:2]]
    assert labels_of(in_memory) == ("toy float64", "toy int4")


def test_exceedance_is_the_share_above() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 4.0, np.nan])
    curve = exceedance(values)
    for x, share in curve:
        assert share == pytest.approx(np.sum(values > x) / 6)
    assert curve[-1][1] == pytest.approx(1 / 6)
    assert exceedance(np.zeros(4)) == []


def test_agreement_is_recounted(labelled: LabelledRuns) -> None:
    rows = agreement_rows(labelled)
    reference, candidate = labelled.runs[0].tokens, labelled.runs[1].tokens
    same = reference.top_ids[:, 0] == candidate.top_ids[:, 0]
    sure = np.exp(reference.top_logprobs[:, 0])
    row = next(r for r in rows if r["run"] == "noise-1.5" and r["confidence"] == "10–25 %")
    inside = (sure >= 0.1) & (sure < 0.25)
    assert row["tokens"] == inside.sum()
    assert row["share"] == pytest.approx(same[inside].mean())
    assert all(r["share"] == 1.0 for r in rows if r["run"] == "noise-1e-07")


def test_which_charts_there_are(labelled: LabelledRuns, runs: list[Run]) -> None:
    names = [chart.name for chart in charts_of(labelled)]
    assert names == ["perplexity", "ratio", "change", "agreement", "position", "trade-off"]
    alone = [chart.name for chart in charts_of(LabelledRuns.of(runs[:1]))]
    assert alone == ["perplexity", "loss", "position"]


def test_a_kl_column_gets_its_chart_and_its_place_in_the_text(runs: list[Run]) -> None:
    candidate = with_kl(runs[1], runs[0])
    labelled = LabelledRuns.of([runs[0], candidate])
    assert "kl" in [chart.name for chart in charts_of(labelled)]
    data = token_data(labelled, tokens=None, max_tokens=10**6, max_alternatives=0)
    total = candidate.tokens.kl.sum(dtype=np.float64)
    assert np.nansum(unpacked(data["runs"][1]["kl"])) == pytest.approx(total, rel=1e-5)
    assert data["runs"][0]["kl"] is None


def test_charts_take_their_colours_from_the_page_and_escape_names(runs: list[Run]) -> None:
    hostile = '"><script>alert(1)</script>'
    for chart in charts_of(LabelledRuns.of(runs[:2], labels=["a & b", hostile])):
        assert "<script" not in chart.svg
        assert "var(--" in chart.svg
        assert not re.search(r"style=|href=|url\(|<image|<foreignObject", chart.svg)
        colours = set(re.findall(r'(?:fill|stroke)="(#[^"]+)"', chart.svg))
        assert colours <= {"#000"}, chart.name  # a default of symbols that are not drawn in it


@pytest.mark.parametrize(
    ("label", "says"),
    [("\x1b[1mbold", "⟨U+001B⟩[1mbold"), ("a\u2028b", "a⟨U+2028⟩b"), ("\ud800\x00", "⟨U+D800⟩")],
)
def test_characters_that_no_drawing_holds_are_written_out(
    runs: list[Run], label: str, says: str
) -> None:
    """The renderer aborts the process, or cannot parse its script, where they come as they are."""
    for chart in charts_of(LabelledRuns.of(runs[:2], labels=["full", label])):
        assert says in chart.svg


class _Elements(HTMLParser):
    """Element names and attributes in the order of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_policy_names_the_one_script_and_the_one_style(runs: list[Run], tmp_path: Path) -> None:
    page = px.write_report(runs, tmp_path / "r.html").path.read_text(encoding="utf-8")
    parser = _Elements()
    parser.feed(page)
    policy = next(a["content"] for t, a in parser.found if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        own = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(own) == 1
        digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for _, attributes in parser.found:
        assert "style" not in attributes
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert not (attributes.get("href") or "#").startswith(("http", "//", "javascript"))


def test_the_summary_is_json(runs: list[Run], tmp_path: Path) -> None:
    summary = px.write_report(runs, tmp_path / "new" / "r.html").to_json()
    again = json.loads(json.dumps(summary, allow_nan=False))
    assert again["num_bytes"] == (tmp_path / "new" / "r.html").stat().st_size
    assert [c["verdict"] for c in again["comparisons"]] == ["worse", "equivalent"]
    assert [r["label"] for r in again["runs"]] == ["full", "noise-1.5", "noise-1e-07"]


def test_conditions_that_differ_are_marked_and_notes_said_once(labelled: LabelledRuns) -> None:
    differing = {c.name for c in conditions_of(labelled) if c.differs}
    assert {"model", "weights", "dtype"} <= differing
    assert not {"input", "protocol", "tokenizer", "threads"} & differing
    notes = notes_of(labelled)
    assert len(notes) == 1
    assert notes[0].startswith("full, noise-1.5, noise-1e-07: the model has 400 vocabulary rows")


def test_refusals(runs: list[Run], byte_tokenizer_json: Path, tmp_path: Path) -> None:
    other = toy_runs(tmp_path / "other", ["Another text altogether."], byte_tokenizer_json)
    with pytest.raises(FingerprintMismatchError, match="the text"):
        px.write_report([runs[0], other[0]], tmp_path / "r.html")
    with pytest.raises(FingerprintMismatchError, match="the input that the run scored"):
        px.write_report(runs, tmp_path / "r.html", tokens=other[0].input_path)
    with pytest.raises(UsageError, match="a label for each of 3 runs, got 1"):
        px.write_report(runs, tmp_path / "r.html", labels=["one"])
    with pytest.raises(UsageError, match="1 to 8 runs"):
        px.write_report([], tmp_path / "r.html")
    with pytest.raises(UsageError, match="0 or more"):
        px.write_report(runs, tmp_path / "r.html", max_tokens=-1)
    unfinished = replace(runs[1], status="interrupted", loaded_tokens=None)
    with pytest.raises(RunError, match="interrupted"):
        px.write_report([runs[0], unfinished], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_without_the_extra_the_message_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(chart_drawings, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"pip install 'perplexit\[report\]'"):
        chart_drawings.loaded("vl_convert")


def test_alternatives_are_spelled_by_the_tokenizer_and_no_other(
    runs: list[Run], byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    labelled = LabelledRuns.of(runs[:2])
    found = token_data(
        labelled, tokenizer=byte_tokenizer_json, max_tokens=10**6, max_alternatives=5
    )["vocabulary"]
    from tokenizers import Tokenizer  # noqa: PLC0415 - only this test asks the library itself

    tokenizer = Tokenizer.from_file(str(byte_tokenizer_json))
    whole = {i: text for i, text in found.items() if not text.startswith("⟨")}
    assert len(whole) > 50
    for index, text in whole.items():
        assert tokenizer.decode([int(index)], skip_special_tokens=False) == text
    changed = json.loads(byte_tokenizer_json.read_text(encoding="utf-8"))
    changed["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(FingerprintMismatchError, match="the tokenizer of the runs"):
        token_data(labelled, tokenizer=tmp_path, max_tokens=10, max_alternatives=5)

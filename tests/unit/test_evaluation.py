"""evaluate: sums, order, policies and the record, on a session whose every nll is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import perplexit as px
from perplexit.errors import (
    CapabilityError,
    EngineOutOfMemoryError,
    NonFiniteError,
    ResumeError,
    RunError,
    UsageError,
    VocabularyError,
)
from perplexit.inputs.token_file import TokenFile
from tests.toy_sessions import BigramSession

TEXTS = [
    "The loss of a token is the negative logarithm of its probability.",
    "Short.",
    "Ein Maß für Überraschung, gemessen Wort für Wort, und keines doppelt gezählt.",
    "Whoever measures twice and gets the same number has measured something. " * 3,
]


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return px.prepare(
        TEXTS,
        tokenizer=byte_tokenizer_json,
        max_length=16,
        stride=7,
        output=tmp_path_factory.mktemp("input") / "in.safetensors",
    )


def brute_force(session: BigramSession, tokens: TokenFile) -> list[float]:
    """The nll of each target, in window order, from the window table alone."""
    losses = []
    for window in tokens.windows:
        base = int(tokens.document_starts[window.document])
        for target in range(window.target_start, window.target_stop):
            before, after = (
                int(i) for i in tokens.token_ids[base + target - 1 : base + target + 1]
            )
            losses.append(-session.logprobs_VV[before, after])
    return losses


def test_the_figures_are_the_brute_force_ones(tokens: TokenFile) -> None:
    session = BigramSession()
    run = px.evaluate(session, tokens)
    expected = brute_force(session, tokens)
    np.testing.assert_allclose(run.tokens.nll, expected, rtol=1e-6)
    assert run.num_tokens == len(expected) == tokens.num_targets
    assert run.nll_sum == math.fsum(float(x) for x in np.float32(expected))
    assert run.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-6)
    assert run.perplexity_low < run.perplexity < run.perplexity_high
    assert run.status == "complete"
    assert run.folder is None
    assert not session.closed  # it was handed in open


@pytest.mark.trap(8)
@pytest.mark.trap(13)
def test_trap_13_denominators_count_the_text_that_was_scored(tokens: TokenFile) -> None:
    run = px.evaluate(BigramSession(), tokens)
    scored_bytes = scored_words = 0
    for document, text in enumerate(TEXTS):
        start = int(tokens.document_starts[document])
        first = int(tokens.byte_starts[start + 1] - tokens.byte_starts[start])
        scored_bytes += len(text.encode()) - first
        scored_words += len(text.split()) - int(tokens.num_words[start])
    assert (run.num_bytes, run.num_words) == (scored_bytes, scored_words)
    assert run.bits_per_byte == pytest.approx(run.nll_sum / math.log(2) / scored_bytes)
    assert run.word_perplexity == pytest.approx(math.exp(run.nll_sum / scored_words))
    assert run.byte_perplexity == pytest.approx(math.exp(run.nll_sum / scored_bytes))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100, "auto"])
def test_results_come_back_in_window_order_whatever_the_batches(
    tokens: TokenFile, batch_size: int | str
) -> None:
    session = BigramSession()
    run = px.evaluate(session, tokens, batch_size=batch_size)
    np.testing.assert_allclose(run.tokens.nll, brute_force(session, tokens), rtol=1e-6)
    assert sorted(w for batch in session.batches for w in batch) == list(range(tokens.num_windows))
    lengths = tokens.fed_lengths()[[w for batch in session.batches for w in batch]]
    assert (np.diff(lengths) <= 0).all()  # longest first


def test_rows_name_document_position_and_bytes(tokens: TokenFile) -> None:
    run = px.evaluate(BigramSession(), tokens, top_k=3)
    rows = run.tokens
    for row in range(0, len(rows), 5):
        window = tokens.windows[int(rows.window[row])]
        fed = tokens.window_ids(int(rows.window[row]))
        assert window.document == rows.document[row]
        assert fed.ids_T[rows.position[row]] == rows.token_id[row]
        text = TEXTS[window.document].encode()
        start, count = int(rows.byte_start[row]), int(rows.num_bytes[row])
        assert rows.token_bytes[row].as_py() == text[start : start + count]
        assert rows.top_ids.shape == (len(rows), 3)
        if rows.rank[row] <= 3:
            assert rows.top_ids[row, rows.rank[row] - 1] == rows.token_id[row]
            assert rows.top_logprobs[row, rows.rank[row] - 1] == pytest.approx(-rows.nll[row])


def test_out_of_memory_halves_the_batch_and_loses_nothing(tokens: TokenFile) -> None:
    session = BigramSession(memory_ids=40, memory_from_batch=1)
    run = px.evaluate(session, tokens, batch_size=9)
    np.testing.assert_allclose(run.tokens.nll, brute_force(session, tokens), rtol=1e-6)
    assert run.batch_plan["batch_size"] == 9
    assert [x["start"] for x in run.batch_plan["limits"]] == [0, 9]
    assert [x["max_windows"] for x in run.batch_plan["limits"]] == [9, 2]
    with pytest.raises(EngineOutOfMemoryError, match="smaller --max-length"):
        px.evaluate(BigramSession(memory_ids=10), tokens)


@pytest.mark.trap(23)
def test_trap_23_a_non_finite_loss_stops_the_run_and_is_named(
    tokens: TokenFile, tmp_path: Path
) -> None:
    bad = int(tokens.token_ids[int(tokens.document_starts[3]) + 5])
    with pytest.raises(
        NonFiniteError, match=rf"nan in window \d+ at position \d+ \(token id {bad}"
    ):
        px.evaluate(BigramSession(bad_token=bad), tokens, run=tmp_path / "run")
    assert px.Run.open(tmp_path / "run").status == "interrupted"


@pytest.mark.trap(23)
def test_trap_23_counted_losses_leave_numerator_and_denominator(tokens: TokenFile) -> None:
    bad = int(tokens.token_ids[int(tokens.document_starts[3]) + 5])
    run = px.evaluate(BigramSession(bad_token=bad), tokens, on_non_finite="count")
    finite = np.isfinite(run.tokens.nll)
    assert run.num_non_finite == int((~finite).sum()) > 0
    assert run.num_tokens == int(finite.sum())
    assert run.num_bytes == int(run.tokens.num_bytes[finite].sum())
    assert run.perplexity == pytest.approx(math.exp(run.tokens.nll[finite].mean(dtype=np.float64)))


def test_what_does_not_fit_is_refused_before_anything_runs(tokens: TokenFile) -> None:
    small = BigramSession(vocab_size=200)
    with pytest.raises(VocabularyError, match="vocabulary of 200"):
        px.evaluate(small, tokens)
    blind = BigramSession(details=False)
    with pytest.raises(CapabilityError, match="top-k"):
        px.evaluate(blind, tokens, top_k=2)
    assert small.batches == blind.batches == []
    assert px.evaluate(blind, tokens).tokens.rank is None
    for wrong in ({"batch_size": 0}, {"top_k": -1}, {"confidence": 1.0}, {"on_non_finite": "skip"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            px.evaluate(blind, tokens, **wrong)


def test_a_stored_run_says_the_same_as_the_one_in_memory(tokens: TokenFile, tmp_path: Path) -> None:
    in_memory = px.evaluate(BigramSession(), tokens, top_k=2)
    stored = px.evaluate(BigramSession(), tokens, top_k=2, run=tmp_path / "run")
    opened = px.Run.open(tmp_path / "run")
    assert opened.to_json() == stored.to_json()
    assert opened.perplexity == in_memory.perplexity
    np.testing.assert_array_equal(opened.tokens.nll, in_memory.tokens.nll)
    np.testing.assert_array_equal(opened.tokens.top_ids, in_memory.tokens.top_ids)
    assert opened.tokens.text_of(3) == in_memory.tokens.text_of(3)
    kept = {"run.json", "tokens.parquet", "documents.parquet", ".lock"}
    assert {p.name for p in (tmp_path / "run").iterdir()} <= kept
    json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)
    columns = pq.read_schema(tmp_path / "run" / "tokens.parquet").names
    promised = {"document", "window", "position", "token_index", "byte_start", "token_id"}
    assert promised | {"nll", "entropy", "rank"} <= set(columns)


@pytest.mark.trap(26)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": 1}, "top_k"),
        ({"on_non_finite": "count"}, "on_non_finite"),
        ({"batch_size": 3}, "batch_size"),
        ({"session": BigramSession(seed=1)}, "model weights"),
    ],
)
def test_trap_26_a_run_is_not_gone_on_with_under_other_conditions(
    tokens: TokenFile, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    px.evaluate(BigramSession(), tokens, run=tmp_path / "run")
    arguments = {"session": BigramSession(), "tokens": tokens, "run": tmp_path / "run"} | change
    with pytest.raises(ResumeError, match=named):
        px.evaluate(**arguments)


def test_a_complete_run_is_returned_without_scoring(tokens: TokenFile, tmp_path: Path) -> None:
    first = px.evaluate(BigramSession(), tokens, run=tmp_path / "run")
    session = BigramSession()
    again = px.evaluate(session, tokens, run=tmp_path / "run")
    assert session.batches == []
    assert again.to_json() == first.to_json()


def test_folders_that_are_not_runs_are_left_alone(tokens: TokenFile, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="other files in it"):
        px.evaluate(BigramSession(), tokens, run=tmp_path)
    with pytest.raises(RunError, match="run folder"):
        px.Run.open(tmp_path)


def test_progress_reaches_the_total(tokens: TokenFile) -> None:
    updates: list[object] = []
    run = px.evaluate(BigramSession(), tokens, progress=updates.append)
    last = updates[-1]
    assert (last.num_tokens, last.num_windows) == (last.total_tokens, last.total_windows)
    assert last.nll_sum == pytest.approx(run.nll_sum)


@pytest.mark.trap(26)
def test_trap_26_a_refusal_names_the_setting_that_differs_and_no_other(
    tokens: TokenFile, tmp_path: Path
) -> None:
    def session(arena: bool) -> BigramSession:
        made = BigramSession()
        settings = {"providers": ["CPU"], "memory": {"arena": arena, "pattern": False}}
        made.description = replace(made.description, settings=settings)
        return made

    px.evaluate(session(True), tokens, run=tmp_path / "run")
    with pytest.raises(ResumeError, match=r"settings\.memory\.arena: recorded yes, now no") as e:
        px.evaluate(session(False), tokens, run=tmp_path / "run")
    assert "providers" not in str(e.value)
    assert "pattern" not in str(e.value)

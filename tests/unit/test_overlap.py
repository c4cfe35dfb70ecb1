"""ngram_overlap: how much of a test text stands in calibration data too."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import CorpusError, UsageError
from perplexit.inputs.overlap import ngram_overlap
from tests.unseen_text import DOCUMENTS


@pytest.mark.trap(28)
def test_trap_28_calibration_data_that_holds_the_test_text_is_found(
    byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    """A stretch of the test text, recased and with other punctuation, hidden in calibration."""
    words = DOCUMENTS[0].split()
    hidden = ", ".join(words[10:40]).upper()
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(f"Something else. {hidden}. And more.", encoding="utf-8")
    tokens = px.prepare(
        list(DOCUMENTS), tokenizer=byte_tokenizer_json, output=tmp_path / "test.safetensors"
    )
    found = ngram_overlap(tokens, calibration)
    assert found.num_shared_words == 30
    assert found.num_shared_documents == 1
    assert found.num_documents == len(DOCUMENTS)
    assert found.examples[0].split() == [w.strip(".,:").casefold() for w in words[10:23]]
    assert "stand in the other text too" in str(found)
    assert ngram_overlap(tmp_path / "test.safetensors", tokens).share == 1.0


@pytest.mark.trap(28)
def test_trap_28_other_data_shares_nothing() -> None:
    found = ngram_overlap(DOCUMENTS[:4], DOCUMENTS[4:])
    assert found.num_shared_words == 0
    assert found.share == 0.0
    assert found.examples == ()


def test_a_gram_does_not_reach_from_one_document_into_the_next() -> None:
    assert ngram_overlap(["a b c", "d e f"], ["a b c d e f"], n=4).num_shared_words == 0
    assert ngram_overlap(["a b c d e f"], ["a b c", "d e f"], n=4).num_shared_words == 0
    assert ngram_overlap(["a b c d e f"], ["a b c", "d e f"], n=3).num_shared_words == 6


def test_documents_too_short_to_be_tested_are_counted() -> None:
    found = ngram_overlap(["one two", "one two three four"], ["one two three four"], n=3)
    assert (found.num_untested_documents, found.num_shared_words, found.num_words) == (1, 4, 6)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="n must be at least 1"):
        ngram_overlap(["a"], ["a"], n=0)
    with pytest.raises(CorpusError, match="words in it, got none"):
        ngram_overlap(["…"], ["a"])


WORDS = st.lists(st.sampled_from("abc"), max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, max_size=3), st.integers(1, 4))
def test_against_a_dull_loop(test: list[list[str]], other: list[list[str]], n: int) -> None:
    if not any(test):
        return
    grams = {tuple(words[i : i + n]) for words in other for i in range(len(words) - n + 1)}
    shared = 0
    for words in test:
        covered = set()
        for start in range(len(words) - n + 1):
            if tuple(words[start : start + n]) in grams:
                covered.update(range(start, start + n))
        shared += len(covered)
    found = ngram_overlap([" ".join(w) for w in test], [" ".join(w) for w in other], n=n)
    assert found.num_shared_words == shared
    assert found.num_words == sum(map(len, test))


@pytest.mark.trap(28)
@pytest.mark.trap(33)
def test_prepare_says_how_much_of_the_corpus_is_in_the_calibration_data(
    byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    corpus, calibration = tmp_path / "test.txt", tmp_path / "calibration.txt"
    corpus.write_text(DOCUMENTS[0], encoding="utf-8")
    calibration.write_text(" ".join(DOCUMENTS[:3]), encoding="utf-8")
    command = f"prepare {corpus} --tokenizer {byte_tokenizer_json} -o {tmp_path / 'in.safetensors'}"
    options = ["--json", "--check-overlap", str(calibration)]
    result = CliRunner().invoke(app, [*command.split(), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["overlap"][str(calibration)]["share"] == 1.0
    assert "100.00% of" in result.stderr
    without = CliRunner().invoke(app, [*command.split(), "--json"])
    assert "overlap" not in json.loads(without.stdout)

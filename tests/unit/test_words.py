"""Surprisal a word: every token counted once, offsets right on any Unicode, exports that agree."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import perplexit as px
from perplexit.errors import FingerprintMismatchError, UsageError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.level_tables import export_words
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText
from perplexit.runs.words import COLUMNS, _word_table, surprisal_of_words
from tests.toy_sessions import BigramSession

TEXTS = [
    "The loss of a token is the negative logarithm of its probability.\n",
    "  Ein Maß für Überraschung,\u00a0Wort\u2003für Wort:\n\n日本語 текст 🙂🙂 e\u0301.  \n",
    "once",
    " \n ",
]
WHITE_SPACE = st.sampled_from([" ", "  ", "\n", "\t", "\u00a0", "\u2003", "\u3000", "\u0085"])
PIECES = st.one_of(WHITE_SPACE, st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
TEXT = st.lists(PIECES, min_size=1, max_size=12).map("".join).filter(lambda text: text != "")


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    folder = tmp_path_factory.mktemp("words")
    return px.prepare(
        TEXTS,
        tokenizer=byte_tokenizer_json,
        max_length=16,
        stride=7,
        output=folder / "in.safetensors",
    )


@pytest.fixture(scope="module")
def run(tokens: TokenFile, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return px.evaluate(BigramSession(), tokens, run=tmp_path_factory.mktemp("words") / "run")


def plain_words(text: str) -> list[tuple[str, int, int]]:
    """(word, first character, character behind it), by walking over the text."""
    words, start = [], None
    for place, character in enumerate(text + " "):
        if character.isspace() or not character.split():
            if start is not None:
                words.append((text[start:place], start, place))
            start = None
        elif start is None:
            start = place
    return words


def plain_sums(tokens: TokenFile, run: Run, document: int, text: str) -> dict[int, float]:
    """Word index → nll, a token and a byte at a time."""
    word_of_byte: list[int | None] = []
    spans = plain_words(text)
    for place, character in enumerate(text):
        inside = [i for i, (_, start, stop) in enumerate(spans) if start <= place < stop]
        word_of_byte += [inside[0] if inside else None] * len(character.encode())
    best: dict[int, tuple[int, float]] = {}
    rows = run.tokens
    for row in np.flatnonzero(rows.document == document).tolist():
        index, position = int(rows.token_index[row]), int(rows.position[row])
        best[index] = max(best.get(index, (-1, 0.0)), (position, float(rows.nll[row])))
    base = int(tokens.document_starts[document])
    text_base = int(tokens.byte_starts[base])
    sums: dict[int, float] = {}
    for index, (_, nll) in best.items():
        start = int(tokens.byte_starts[base + index]) - text_base
        stop = int(tokens.byte_starts[base + index + 1]) - text_base
        own = [w for w in word_of_byte[start:stop] if w is not None]
        behind = [w for w in word_of_byte[stop:] if w is not None]
        word = own[0] if own else behind[0] if behind else max(len(spans) - 1, 0)
        sums[word] = sums.get(word, 0.0) + nll
    return sums


def check_against_the_plain_way(texts: list[str], tokens: TokenFile, run: Run) -> None:
    table = surprisal_of_words(run, tokens).to_pylist()
    total = sum(row["nll"] or 0.0 for row in table)
    assert total == pytest.approx(math.fsum(run.tokens.nll.tolist()), rel=1e-9)
    for document, text in enumerate(texts):
        own = [row for row in table if row["document"] == document]
        found = [(r["word"], r["char_start"], r["char_stop"]) for r in own]
        assert found == (plain_words(text) or [("", 0, 0)])
        assert [r["word_index"] for r in own] == list(range(len(own)))
        for row in own:
            assert text[row["char_start"] : row["char_stop"]] == row["word"]
            data = text.encode()[row["byte_start"] : row["byte_stop"]]
            assert data.decode() == row["word"]
        sums = plain_sums(tokens, run, document, text)
        for row in own:
            expected = sums.get(row["word_index"])
            assert row["nll"] == (None if expected is None else pytest.approx(expected))


def test_words_offsets_and_sums_are_the_plain_ones(tokens: TokenFile, run: Run) -> None:
    check_against_the_plain_way(TEXTS, tokens, run)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TEXT, min_size=1, max_size=3))
def test_any_unicode(texts: list[str], byte_tokenizer_json: Path) -> None:
    if not any(len(text.encode()) > 1 for text in texts):
        texts = [*texts, "a b"]
    tokens = px.prepare([*texts, "ab c"], tokenizer=byte_tokenizer_json, bos="none")
    run = px.evaluate(BigramSession(), tokens)
    check_against_the_plain_way([*texts, "ab c"], tokens, run)


def test_the_blank_in_front_of_a_word_counts_for_the_word(
    byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    tokens = px.prepare(["it is the one of the two"], tokenizer=byte_tokenizer_json)
    run = px.evaluate(BigramSession(), tokens)
    text = [run.tokens.text_of(row) for row in range(len(run.tokens))]
    assert any(piece.startswith(" ") and len(piece) > 1 for piece in text)  # " t", " the", …
    first = surprisal_of_words(run, tokens).to_pylist()[1]
    assert first["word"] == "is"
    spelled = run.tokens.nll[[i for i, r in enumerate(run.tokens.byte_start) if 2 <= r < 5]]
    assert first["nll"] == pytest.approx(float(spelled.sum()))
    assert first["surprisal_bits"] == pytest.approx(first["nll"] / math.log(2))


def test_what_was_not_scored_is_not_called_complete(tokens: TokenFile, run: Run) -> None:
    table = surprisal_of_words(run, tokens).to_pylist()
    first_words = [row for row in table if row["word_index"] == 0]
    assert not any(row["complete"] for row in first_words)  # a document's first id has no context
    others = [row for row in table if row["word_index"] > 0]
    assert others
    assert all(row["complete"] for row in others)
    assert next(row["nll"] for row in table if row["word"] == "once") is not None


def stub(text: str, cuts: list[int], nll: list[float]) -> dict[str, list[Any]]:
    """The word table of one document whose tokens end at the byte offsets `cuts`."""
    count = len(cuts)
    run_text = RunText(
        document=np.zeros(count, np.int64),
        token_index=np.arange(count),
        token_id=np.zeros(count, np.int64),
        row=np.arange(count),
        byte_starts=np.array([0, *cuts], np.int64),
        text_bytes=text.encode(),
        has_gaps=False,
    )
    return _word_table(run_text, np.array(nll)).to_pydict()


def test_a_token_over_several_words_goes_to_the_first_and_all_are_marked() -> None:
    table = stub("in the end of", [2, 9, 10, 13], [1.0, 2.0, 4.0, 8.0])  # "in", " the en", "d"
    assert table["word"] == ["in", "the", "end", "of"]
    assert table["nll"] == [1.0, 2.0, 4.0, 8.0]
    assert table["shares_token"] == [False, True, True, False]
    assert table["complete"] == [True, True, False, True]


def test_a_word_inside_another_words_token_has_no_loss_rather_than_none_at_all() -> None:
    table = stub("as a rule", [4, 9], [1.0, 2.0])  # "as a", " rule"
    assert table["nll"] == [1.0, None, 2.0]
    assert table["num_tokens"] == [1, 0, 1]
    assert table["complete"] == [True, False, True]


def test_white_space_tokens_count_for_the_word_behind_them_and_are_shown_apart() -> None:
    table = stub("a\n\nb\n", [1, 3, 4, 5], [1.0, 2.0, 4.0, 8.0])
    assert table["nll"] == [1.0, 14.0]
    assert table["nll_white_space"] == [0.0, 10.0]


def test_an_unscored_token_leaves_its_word_incomplete() -> None:
    table = stub("ab cd", [1, 2, 5], [math.nan, 1.0, 2.0])
    assert table["complete"] == [False, True]
    assert table["nll"] == [1.0, 2.0]


def test_overlapping_windows_count_a_token_once(byte_tokenizer_json: Path) -> None:
    text = "Whoever measures twice and gets the same number has measured something. " * 30
    tokens = px.prepare([text], tokenizer=byte_tokenizer_json, protocol="mlc")
    run = px.evaluate(BigramSession(), tokens)
    table = surprisal_of_words(run, tokens).to_pydict()
    seen = {int(i): float(n) for i, n in zip(run.tokens.token_index, run.tokens.nll, strict=True)}
    assert len(seen) < len(run.tokens)
    assert sum(n or 0.0 for n in table["nll"]) == pytest.approx(sum(seen.values()), rel=1e-6)


def test_exports_agree(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    paths = [export_words(run.folder, tmp_path / f"w{s}") for s in (".csv", ".parquet", ".jsonl")]
    as_parquet = pq.read_table(paths[1]).to_pylist()
    with paths[0].open(encoding="utf-8", newline="") as file:
        as_csv = list(csv.DictReader(file))
    as_lines = [json.loads(line) for line in paths[2].read_text(encoding="utf-8").splitlines()]
    assert as_lines == as_parquet
    document, *others = COLUMNS
    columns = [document, "source_file", "source_row", *others]
    assert list(as_csv[0]) == columns == list(as_parquet[0])
    assert [row["word"] for row in as_csv] == [row["word"] for row in as_parquet]
    assert [float(r["nll"] or "nan") for r in as_csv] == pytest.approx(
        [math.nan if r["nll"] is None else r["nll"] for r in as_parquet], nan_ok=True
    )


def test_refusals(run: Run, byte_tokenizer_json: Path, tmp_path: Path) -> None:
    other = px.prepare(["another text"], tokenizer=byte_tokenizer_json)
    with pytest.raises(FingerprintMismatchError, match="the input that the run scored"):
        surprisal_of_words(run, other)
    with pytest.raises(UsageError, match=r"\.csv, \.parquet, \.jsonl"):
        export_words(run, tmp_path / "words.xlsx")
    with pytest.raises(UsageError, match="--input"):
        surprisal_of_words(replace(run, input_path=str(tmp_path / "gone.safetensors")))

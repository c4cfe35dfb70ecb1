"""`prepared_texts`: what counts as a text or a path, and the cache of token files."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from perplexit.errors import CorpusError, EmptyScoreError, UsageError
from perplexit.inputs import text_inputs
from perplexit.inputs.preparing import prepare
from perplexit.inputs.text_inputs import prepared_texts
from perplexit.inputs.tokenizer_sources import load_tokenizer
from tests.unit import tokenizer_zoo as zoo

TEXT = "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(zoo.byte_level())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PERPLEXIT_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder / "inputs"


def cached(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.is_dir() else []


@pytest.mark.parametrize("texts", [TEXT, [TEXT], (TEXT, "More text.")])
def test_texts_become_the_token_file_that_prepare_makes(tokenizer, cache, texts):
    given = [texts] if isinstance(texts, str) else list(texts)
    found = prepared_texts(texts, tokenizer)
    expected = prepare(given, tokenizer=tokenizer)
    assert found.input_fingerprint == expected.input_fingerprint
    assert found.spec["protocol"]["max_length"] == 1024  # as `prepare` takes it
    assert found.num_documents == len(given)
    assert cached(cache) == [found.path]
    assert prepared_texts(iter(given), tokenizer).path == found.path


def test_a_str_is_one_document(tokenizer):
    assert prepared_texts(TEXT, tokenizer).num_documents == 1


def test_options_reach_the_protocol_and_change_the_file(tokenizer, cache):
    first = prepared_texts(TEXT, tokenizer, protocol="disjoint", max_length=16)
    assert first.spec["protocol"]["name"] == "disjoint"
    assert first.fed_lengths().max() == 16
    second = prepared_texts(TEXT, tokenizer, max_length=16, stride=4)
    assert second.spec["protocol"]["stride"] == 4
    assert len(cached(cache)) == 2
    with pytest.raises(UsageError, match="bos must be one of"):
        prepared_texts(TEXT, tokenizer, bos="sometimes")


def test_another_tokenizer_or_text_is_another_file(tokenizer, cache):
    prepared_texts(TEXT, tokenizer)
    prepared_texts(TEXT + "!", tokenizer)
    prepared_texts([TEXT, ""], tokenizer)
    prepared_texts(TEXT, zoo.metaspace_byte_fallback())
    assert len(cached(cache)) == 4


def test_the_same_texts_are_tokenised_once(tokenizer, cache, monkeypatch):
    first = prepared_texts([TEXT, "More text."], tokenizer)
    monkeypatch.setattr(text_inputs, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    again = prepared_texts([TEXT, "More text."], tokenizer)
    assert again.path == first.path
    assert again.input_fingerprint == first.input_fingerprint
    assert cached(cache) == [first.path]


@pytest.mark.parametrize("place", [4, 200, -3])
def test_a_damaged_file_in_the_cache_is_made_again(tokenizer, cache, place):
    first = prepared_texts(TEXT, tokenizer)
    data = bytearray(first.path.read_bytes())
    data[place] ^= 1
    first.path.write_bytes(data)
    again = prepared_texts(TEXT, tokenizer)
    assert again.input_fingerprint == first.input_fingerprint
    assert cached(cache) == [again.path]


def test_a_str_that_names_a_file_is_that_file(tokenizer, cache, tmp_path):
    Path("speech").write_text(TEXT)
    by_name = prepared_texts("speech", tokenizer)
    assert by_name.sources.files == ("speech",)
    by_path = prepared_texts(Path("speech"), tokenizer)
    assert by_path.path == by_name.path
    assert by_name.text_fingerprint == prepared_texts(TEXT, tokenizer).text_fingerprint
    (tmp_path / "second.txt").write_text("Another one.")
    both = prepared_texts(["speech", tmp_path / "second.txt", "And a text."], tokenizer)
    assert both.num_documents == 3


def test_a_file_that_changed_is_prepared_again(tokenizer):
    Path("speech.txt").write_text(TEXT)
    first = prepared_texts("speech.txt", tokenizer)
    Path("speech.txt").write_text(TEXT + "More.")
    second = prepared_texts("speech.txt", tokenizer)
    assert second.text_fingerprint != first.text_fingerprint


def test_a_folder_is_read_and_a_bare_word_is_a_text(tokenizer):
    Path("pages").mkdir()
    Path("pages/a.txt").write_text(TEXT)
    assert prepared_texts("./pages", tokenizer).sources.files == ("pages/a.txt",)
    word = prepared_texts("pages", tokenizer, bos="none")  # a text of several tokens
    assert bytes(np.asarray(word.text_bytes)) == b"pages"


def test_a_tables_columns_are_named(tokenizer):
    Path("qa.jsonl").write_text('{"q": "Who? ", "a": "The quick fox."}\n')
    found = prepared_texts("qa.jsonl", tokenizer, text_key="a", prompt_key="q", protocol="document")
    assert found.scored_mask is not None
    assert found.num_targets == int(found.scored_mask.sum())


@pytest.mark.parametrize("text", ["data/speech.txt", "./a.md", r"C:\texts\a.jsonl", "/no/b.gz"])
def test_a_path_that_does_not_exist_is_said_to_be_one(tokenizer, text):
    with pytest.raises(UsageError, match="looks like a path, and there is no such file"):
        prepared_texts(text, tokenizer)
    with pytest.raises(UsageError, match="looks like a path"):
        prepared_texts([TEXT, text], tokenizer)


@pytest.mark.parametrize("text", ["and/or this one.", "1/2 is 0.5", "speech.txt or", "a/b\nc.d"])
def test_a_text_with_blanks_or_without_a_suffix_is_a_text(tokenizer, text):
    assert bytes(np.asarray(prepared_texts(text, tokenizer).text_bytes)) == text.encode()


@pytest.mark.parametrize("texts", ["", " \n", [""], ["", " "]])
def test_empty_texts_are_refused(tokenizer, cache, texts):
    with pytest.raises(UsageError, match=r"expected text to score, got .*empty text"):
        prepared_texts(texts, tokenizer)
    assert not cached(cache)


def test_an_empty_list_is_refused_with_what_to_give(tokenizer):
    with pytest.raises(UsageError, match="got an empty list; give a text, a list of texts, or"):
        prepared_texts([], tokenizer)


@pytest.mark.parametrize("texts", [5, None, b"bytes", [b"bytes"], [5], {"text": [TEXT]}])
def test_what_is_no_text_is_refused_by_its_type(tokenizer, texts):
    with pytest.raises(UsageError, match=r"expected .*, got (int|NoneType|bytes|dict)"):
        prepared_texts(texts, tokenizer)


def test_a_missing_path_object_and_a_pipe_are_refused(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        prepared_texts(Path("missing.txt"), tokenizer)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises((CorpusError, UsageError), match=r"a named pipe"):
        prepared_texts(tmp_path / "pipe.txt", tokenizer)


def test_a_text_without_a_target_is_refused_and_leaves_nothing(tokenizer, cache):
    with pytest.raises(EmptyScoreError):
        prepared_texts("a", tokenizer, bos="none")
    assert not cached(cache)


def test_without_a_cache_folder_the_file_is_a_temporary_one(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "file"))
    found = prepared_texts(TEXT, tokenizer)
    assert found.num_targets > 0
    assert tmp_path not in found.path.parents


def _prepare_in_process(_: int) -> str:
    return prepared_texts([TEXT] * 50, load_tokenizer(zoo.byte_level())).input_fingerprint


def test_two_processes_at_once_leave_one_copy(cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        fingerprints = pool.map(_prepare_in_process, range(2))
    assert len(set(fingerprints)) == 1
    assert len(cached(cache)) == 1

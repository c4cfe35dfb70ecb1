"""KenLM behind the session contract, against a dull evaluator of ARPA files."""

import math
from pathlib import Path

import numpy as np
import pytest

from perplexit.errors import CapabilityError, ModelError, VocabularyError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.ngram import NgramInferenceSession

# Trigrams over a, b, c with holes, so that both back-off levels are taken. Log10, ARPA's own form.
_UNIGRAMS = {
    "<unk>": (-1.9, 0.0),
    "<s>": (-99.0, -0.35),
    "</s>": (-0.8, 0.0),
    "a": (-0.6, -0.2),
    "b": (-0.7, -0.4),
    "c": (-0.9, -0.1),
}
_BIGRAMS = {
    "<s> a": (-0.2, -0.15),
    "a b": (-0.3, -0.25),
    "b a": (-0.5, -0.05),
    "b c": (-0.4, -0.3),
    "c </s>": (-0.3, 0.0),
}
_TRIGRAMS = {"<s> a b": -0.1, "a b a": -0.45, "b c </s>": -0.05}


def _arpa(path: Path, *, rename: dict[str, str] | None = None, unknown: bool = True) -> Path:
    rename = rename or {}

    def named(words: str) -> str:
        return " ".join(rename.get(word, word) for word in words.split())

    unigrams = {w: v for w, v in _UNIGRAMS.items() if unknown or w != "<unk>"}
    lines = ["\\data\\", f"ngram 1={len(unigrams)}", f"ngram 2={len(_BIGRAMS)}"]
    lines += [f"ngram 3={len(_TRIGRAMS)}", "", "\\1-grams:"]
    lines += [f"{p}\t{named(w)}\t{b}" for w, (p, b) in unigrams.items()]
    lines += ["", "\\2-grams:", *(f"{p}\t{named(w)}\t{b}" for w, (p, b) in _BIGRAMS.items())]
    lines += ["", "\\3-grams:", *(f"{p}\t{named(w)}" for w, p in _TRIGRAMS.items())]
    path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
    return path


def _log10(context: list[str], word: str) -> float:
    """The textbook recursion: the longest known n-gram, else back-off weight plus a shorter one."""
    context = context[-2:]
    if len(context) == 2 and " ".join([*context, word]) in _TRIGRAMS:
        return _TRIGRAMS[" ".join([*context, word])]
    if len(context) == 2:
        known = _BIGRAMS.get(" ".join(context))
        return (known[1] if known else 0.0) + _log10(context[1:], word)
    if len(context) == 1 and " ".join([*context, word]) in _BIGRAMS:
        return _BIGRAMS[" ".join([*context, word])][0]
    if len(context) == 1:
        return _UNIGRAMS.get(context[0], _UNIGRAMS["<unk>"])[1] + _log10([], word)
    return _UNIGRAMS.get(word, _UNIGRAMS["<unk>"])[0]


_WORDS = ["<s>", "</s>", "a", "b", "c", "never-seen"]


def _model(folder: Path, **options) -> Path:
    path = _arpa(folder / "small.arpa", **options)
    (folder / "vocabulary.txt").write_text("\n".join(_WORDS) + "\n", encoding="utf-8")
    return path


def _expected(words: list[str], targets: np.ndarray) -> np.ndarray:
    return np.array([-math.log(10) * _log10(words[:t], words[t]) for t in targets])


def test_agrees_with_the_arpa_recursion_on_every_short_sequence(tmp_path):
    session = NgramInferenceSession(_model(tmp_path))
    rng = np.random.default_rng(0)
    windows = [
        WindowIds(i, rng.integers(1, 6, 12).astype(np.int32), np.arange(1, 12)) for i in range(60)
    ]
    for window, nll in zip(windows, session.token_nll(windows), strict=True):
        words = [_WORDS[index] for index in window.ids_T]
        np.testing.assert_allclose(nll, _expected(words, window.targets_N), rtol=1e-6, atol=1e-6)
    assert session.num_unknown == sum(int((w.ids_T[1:] == 5).sum()) for w in windows)


@pytest.mark.trap(2)
def test_the_sentence_begin_counts_only_where_the_window_has_it(tmp_path):
    """Trap 2: a window with the prefix `<s>` starts in that state; one without, without."""
    session = NgramInferenceSession(_model(tmp_path))
    with_bos = WindowIds(0, np.array([0, 2, 3], dtype=np.int32), np.array([1, 2]))
    without = WindowIds(1, np.array([2, 3], dtype=np.int32), np.array([1]))
    first, second = session.token_nll([with_bos, without])
    np.testing.assert_allclose(first, np.array([0.2, 0.1]) * math.log(10), rtol=1e-6)
    np.testing.assert_allclose(second, np.array([0.3]) * math.log(10), rtol=1e-6)


def test_without_a_vocabulary_file_the_words_are_decimal_ids(tmp_path):
    path = _arpa(tmp_path / "ids.arpa", rename={"a": "17", "b": "4", "c": "901"})
    session = NgramInferenceSession(path)
    window = WindowIds(0, np.array([17, 4, 17, 5], dtype=np.int32), np.array([1, 2, 3]))
    words = ["a", "b", "a", "never-seen"]
    np.testing.assert_allclose(
        session.token_nll([window])[0], _expected(words, window.targets_N), rtol=1e-6
    )
    assert session.description.settings["words"] == "decimal ids"
    assert session.model.architecture == "3-gram"
    assert session.model.num_parameters == len(_UNIGRAMS) + len(_BIGRAMS) + len(_TRIGRAMS)


def test_a_model_without_unk_refuses_unknown_words_by_name(tmp_path):
    session = NgramInferenceSession(_model(tmp_path, unknown=False))
    window = WindowIds(3, np.array([2, 5], dtype=np.int32), np.array([1]))
    with pytest.raises(VocabularyError, match=r"'never-seen' \(id 5, window 3, position 1\)"):
        session.token_nll([window])


@pytest.mark.trap(18)
def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    """Trap 18: an id without a line in vocabulary.txt has no word."""
    session = NgramInferenceSession(_model(tmp_path))
    assert session.model.vocab_size == len(_WORDS)
    with pytest.raises(VocabularyError, match="got 6"):
        session.token_nll([WindowIds(0, np.array([2, 6], dtype=np.int32), np.array([1]))])


@pytest.mark.trap(26)
def test_the_vocabulary_is_part_of_the_model_s_identity(tmp_path):
    """Trap 26: the same ARPA under another vocabulary gives other numbers."""
    first = NgramInferenceSession(_model(tmp_path)).model.weights_fingerprint
    (tmp_path / "vocabulary.txt").write_text("\n".join(_WORDS[::-1]) + "\n", encoding="utf-8")
    assert NgramInferenceSession(tmp_path / "small.arpa").model.weights_fingerprint != first


def test_a_word_with_a_blank_is_refused_since_kenlm_would_divide_it(tmp_path):
    path = _model(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("a b\nc\n", encoding="utf-8")
    with pytest.raises(ModelError, match="'a b' on line 1"):
        NgramInferenceSession(path)


def test_files_that_are_no_model_and_settings_without_meaning_are_refused(tmp_path):
    path = tmp_path / "text.arpa"
    path.write_text("no model\n", encoding="utf-8")
    with pytest.raises(ModelError, match="ARPA"):
        NgramInferenceSession(path)
    with pytest.raises(ModelError, match="found none"):
        NgramInferenceSession(tmp_path / "absent.arpa")
    with pytest.raises(CapabilityError, match="--quantization"):
        NgramInferenceSession(_model(tmp_path), quantization="int8")

"""Long texts in parts: the ids, bytes and words are those of one whole encode, or it is refused."""

import functools
import io
import json
import random
import string

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

import perplexit as px
from perplexit.errors import CorpusError, TokenizerError
from perplexit.inputs import long_text
from perplexit.inputs.text_cuts import GPT2_PATTERN
from perplexit.inputs.tokenizer_sources import load_tokenizer
from tests.unseen_text import DOCUMENTS

SIZE = 60_000
CJK, KANA, HANGUL = (0x4E00, 0x9FA5), (0x3041, 0x3096), (0xAC00, 0xD7A3)


def prose(size: int) -> str:
    """Words as people write them: blanks, line ends, runs of blanks, quotes, numbers."""
    rng = random.Random(size)
    words = " ".join(DOCUMENTS).split()
    out: list[str] = []
    length = 0
    while length < size:
        word = rng.choice(words)
        if rng.random() < 0.1:
            word += rng.choice([".", ",", "'s", "'re", "…", "\n", "\n\n", "  ", "\t", " - "])
        if rng.random() < 0.05:
            word += str(rng.randrange(100_000))
        out.append(word)
        length += len(word) + 1
    return " ".join(out)


def scripts(size: int) -> str:
    """Several scripts, marks that combine, emoji of several code points, control characters."""
    rng = random.Random(size + 1)
    ranges = [CJK, KANA, HANGUL, (0x410, 0x44F), (0x600, 0x6FF), (0x300, 0x36F), (0x900, 0x97F)]
    out = []
    while sum(map(len, out)) < size:
        low, high = rng.choice(ranges)
        out.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12))))
        extras = [" ", "🙂", "👩‍👧", "é", "e\u0301", "\u00a0", "\ufb01", "\u200d", "\r\n", "\x07"]
        out.append(rng.choice(extras))
        out.append(rng.choice(["word", " and", " 1234", "x' y", "\u3000"]))
    return "".join(out)


def unicode_soup(size: int) -> str:
    rng = random.Random(size + 2)
    points = (rng.randrange(1, 0x110000) for _ in range(2 * size))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)[:size]


def base64_like(size: int) -> str:
    rng = random.Random(size + 3)
    return "".join(rng.choices(string.ascii_letters + string.digits + "+/", k=size))


TEXTS = {
    "prose": prose,
    "prose without blanks": lambda size: "".join(prose(size * 5 // 4).split()),
    "scripts": scripts,
    "scripts without blanks": lambda size: "".join(scripts(size * 5 // 4).split()),
    "unicode": unicode_soup,
    "base64": base64_like,
}


def _trained(
    tokenizer: tokenizers.Tokenizer, trainer: object, size: int = 20_000
) -> tokenizers.Tokenizer:
    lines = [*prose(80_000).splitlines(), scripts(size)]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def byte_level(prefix: bool = False, **options: object) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    return _trained(tokenizer, trainer)


def split_first(pattern: str) -> tokenizers.Tokenizer:
    """A regular expression of its own before the bytes, as Llama 3 and Qwen have it."""
    tokenizer = byte_level()
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return tokenizer


def llama_like() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, max_token_length=10, show_progress=False
    )
    return _trained(tokenizer, trainer)


def unigram(split: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    if not split:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
        _trained(tokenizer, trainer, size=300)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        return tokenizer
    return _trained(tokenizer, trainer, size=300)


def word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=2500, special_tokens=["[UNK]"], show_progress=False
    )
    return _trained(tokenizer, trainer)


def with_added_tokens() -> tokenizers.Tokenizer:
    """Tokens that eat the blanks around them, one with a blank inside, runs of blanks."""
    tokenizer = byte_level()
    tokenizer.add_tokens([
        tokenizers.AddedToken("an", lstrip=True),
        tokenizers.AddedToken("e t", rstrip=True),
        tokenizers.AddedToken("  "),
        tokenizers.AddedToken("in", single_word=True),
    ])  # fmt: skip
    return tokenizer


@functools.cache
def sentence_piece(kind: str, rule: str = "identity") -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(80_000).splitlines()),
        model_writer=model,
        vocab_size=1000,
        model_type=kind,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        byte_fallback=rule == "identity",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = {
    "byte-level BPE": byte_level,
    "byte-level BPE, a blank before": lambda: byte_level(prefix=True),
    "byte-level BPE, whole words looked up": lambda: byte_level(ignore_merges=True),
    "byte-level BPE, added tokens": with_added_tokens,
    "split by GPT-2's expression": lambda: split_first(GPT2_PATTERN),
    "split by Llama 3's expression": lambda: split_first(LLAMA3),
    "BPE of characters": llama_like,
    "Unigram": unigram,
    "Unigram over whole texts": lambda: unigram(split=False),
    "WordPiece": word_piece,
    "SentencePiece BPE": lambda: sentence_piece("bpe"),
    "SentencePiece BPE, nmt_nfkc": lambda: sentence_piece("bpe", "nmt_nfkc"),
    "SentencePiece Unigram": lambda: sentence_piece("unigram"),
}
# What has no place for a cut in texts without blanks, or in none at all.
SOUP = ("WordPiece", "unicode")
WHOLE = {"Unigram over whole texts", "SentencePiece Unigram"}


@pytest.fixture(scope="module")
def loaded():
    return functools.cache(lambda name: load_tokenizer(TOKENIZERS[name]()))


@pytest.mark.parametrize(
    ("name", "kind"),
    # nearly all of these characters are unknown to WordPiece, which is refused whole or in parts
    [(name, kind) for name in TOKENIZERS for kind in TEXTS if (name, kind) != SOUP],
)
def test_d4_parts_give_the_ids_of_the_whole(loaded, monkeypatch, name, kind):
    """Parts of a few thousand characters, so that every text has many cuts."""
    monkeypatch.setattr(long_text, "PART_CHARACTERS", 700)
    tokenizer, text = loaded(name), TEXTS[kind](SIZE)
    whole = tokenizer.encode_batch([text])
    pieces = (text[at : at + 9973] for at in range(0, len(text), 9973))
    parts = list(tokenizer.encode_long(pieces, name="the text"))
    assert b"".join(part.text_bytes for part in parts) == whole.text_bytes
    assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    assert np.array_equal(np.concatenate([p.num_words for p in parts]), whole.num_words)
    lengths = [np.diff(part.byte_starts) for part in parts]
    assert np.array_equal(np.concatenate(lengths), np.diff(whole.byte_starts))
    if kind == "prose" and name not in WHOLE:
        assert len(parts) > 40


def test_d4_a_long_document_is_the_same_token_file(tmp_path, monkeypatch, byte_tokenizer_json):
    """Text files, rows, prompts and joined protocols, cut or whole: one fingerprint."""
    text = prose(SIZE)
    (tmp_path / "one.txt").write_text(text)
    rows = [
        {"text": text, "ask": "Why? ", "id": 1},
        {"text": "", "ask": "", "id": 2},
        {"text": "short", "ask": text, "id": 3},
        {"text": "An end.", "ask": "", "id": 4},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = [
        ((tmp_path / "one.txt",), {}),
        ((path,), {"keep": "id"}),
        ((path,), {"prompt_key": "ask"}),
        ((path,), {"protocol": "hf-guide"}),
        (([text, "", "short"],), {"protocol": "disjoint", "max_length": 64}),
    ]

    def prepared():
        found = [px.prepare(*a, tokenizer=byte_tokenizer_json, **o) for a, o in calls]
        return found, [tokens.input_fingerprint for tokens in found]

    whole, expected = prepared()
    monkeypatch.setattr(long_text, "LONG_CHARACTERS", 2_000)
    monkeypatch.setattr("perplexit.inputs.corpus.LONG_CHARACTERS", 2_000)
    monkeypatch.setattr(long_text, "PART_CHARACTERS", 1_000)
    cut, found = prepared()
    assert found == expected
    assert [cut[1].sources.of(d) for d in range(3)] == [whole[1].sources.of(d) for d in range(3)]


def test_d4_a_text_that_cannot_be_cut_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(long_text, "LONG_CHARACTERS", 2_000)
    monkeypatch.setattr("perplexit.inputs.corpus.LONG_CHARACTERS", 2_000)
    monkeypatch.setattr(long_text, "PART_CHARACTERS", 1_000)
    monkeypatch.setattr(long_text, "LARGEST_WHOLE", 20_000)
    (tmp_path / "line.txt").write_text("".join(prose(40_000).split()))
    (tmp_path / "same.txt").write_text("e" * 40_000)
    for tokenizer, name, reason in (
        (sentence_piece("unigram"), "line.txt", "Unigram adds up scores"),
        (unigram(), "line.txt", "its model is Unigram"),
        (byte_level(ignore_merges=True), "line.txt", "ignore_merges = True"),
        (byte_level(), "same.txt", "no place where this tokenizer lets a text be cut"),
    ):
        with pytest.raises(TokenizerError, match=rf"{name}.*{reason}"):
            px.prepare(tmp_path / name, tokenizer=tokenizer, output=tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line.txt", "same.txt"]


def test_d4_sibling_an_unknown_pre_tokenizer_is_never_cut(loaded):
    """Of an expression that is not known, nothing is assumed."""
    tokenizer = split_first(r"\p{L}+ \p{L}+|\s|.")
    assert not load_tokenizer(tokenizer)._backend.cut_rule.cuts
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace(tokenizers.Regex("a b"), "c")
    assert not load_tokenizer(tokenizer)._backend.cut_rule.cuts


def test_d4_sibling_wrong_bytes_deep_in_a_long_text_are_named(tmp_path, byte_tokenizer_json):
    data = prose(3_000_000).encode()
    path = tmp_path / "long.txt"
    for place in (len(data), data.index(b" ", 2_500_000)):
        path.write_bytes(data[:place] + b"\xff" + data[place:])
        with pytest.raises(CorpusError, match=rf"long\.txt is not UTF-8: byte {place} \(0xFF\)"):
            px.prepare(path, tokenizer=byte_tokenizer_json)
    path.write_bytes("ß".encode() * 1_600_000 + b"\xc3")
    with pytest.raises(CorpusError, match=r"byte 3200000 \(0xC3\)"):
        px.prepare(path, tokenizer=byte_tokenizer_json)

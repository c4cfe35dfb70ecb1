"""Exact bytes and words per token over many tokenizers; loading; refusals."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from perplexit.errors import CorpusError, MissingPackageError, TokenizerError
from perplexit.inputs import tokenizer_sources
from perplexit.inputs.encoded_batch import bytes_from_spans, word_starts
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.tokenizer_sources import load_tokenizer
from tests.unit import tokenizer_zoo as zoo

NASTY = [
    *("a", "B", "1", " ", ".", "\n", "\t", "  ", "\r\n", " the", "don't", "##"),
    *(
        "▁",
        "Ġ",
        "é",
        "e\u0301",
        "ß",
        "½",
        "\ufb01",
        "İ",
        "①",
        "…",
        "漢",
        "字",
        "각",
        "\u1100\u1161",
    ),
    *("🙂", "👍🏽", "𐍈", "ก", "\u00a0", "\u2028", "\u3000", "\ufeff", "\x00", "\x1c", "\u200b"),
    *("\u202e", "<s>", "<unk>", "<0x41>", "[UNK]", "<|endoftext|>"),
]
any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(NASTY), max_size=20).map("".join),
)


@pytest.fixture(scope="module", params=sorted(zoo.FAMILIES))
def any_tokenizer(request):
    return load_tokenizer(zoo.FAMILIES[request.param]())


def pieces(batch):
    """The bytes of each token."""
    bounds = batch.byte_starts.tolist()
    return [batch.text_bytes[a:b] for a, b in pairwise(bounds)]


@pytest.mark.trap(14)
@settings(deadline=None, max_examples=150)
@given(text=any_text)
def test_trap_14_bytes_per_token_sum_to_the_text(any_tokenizer, text):
    try:
        batch = any_tokenizer.encode_batch([text])
    except TokenizerError:
        # only for text with no token in this vocabulary, or next to none but "unknown" (trap 34)
        backend = any_tokenizer._backend
        ids = list(backend.encode_ids([text])[0])
        assert len(ids) <= 1 or ids.count(backend.unknown_id) > 0.9 * len(ids)
        return
    assert batch.byte_starts[0] == 0
    assert (np.diff(batch.byte_starts) >= 0).all()
    assert len(batch.byte_starts) == len(batch.ids) + 1
    if len(batch.ids):
        assert batch.text_bytes == text.encode()
        assert batch.byte_starts[-1] == len(text.encode())
        assert batch.num_words.sum() == len(text.split())
    else:
        assert not text.strip()
    assert batch.ids.tolist() == list(any_tokenizer._backend.encode_ids([text])[0])


@pytest.mark.trap(14)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(any_text.filter(str.strip), min_size=1, max_size=6))
def test_trap_14_a_batch_is_its_documents_one_by_one(any_tokenizer, texts):
    """Whichever way the batch takes to the bytes, each document's answer is the same."""
    try:
        alone = [any_tokenizer.encode_batch([text]) for text in texts]
    except TokenizerError:
        return
    together = any_tokenizer.encode_batch(texts)
    assert pieces(together) == [piece for batch in alone for piece in pieces(batch)]
    assert together.num_words.tolist() == [n for batch in alone for n in batch.num_words.tolist()]
    assert np.diff(together.document_starts).tolist() == [len(batch.ids) for batch in alone]


@pytest.mark.trap(14)
@pytest.mark.real_model
@settings(deadline=None, max_examples=100)
@given(text=any_text)
def test_trap_14_bytes_of_the_real_models_tokenizer(real_tokenizer, text):
    try:
        batch = real_tokenizer.encode_batch([text])
    except TokenizerError:  # the vocabulary lacks a few control characters
        assert len(real_tokenizer._backend.encode_ids([text])[0]) == 0
        return
    if len(batch.ids) == 0:
        assert not text.strip()
        return
    assert batch.byte_starts[-1] == len(text.encode())
    assert batch.num_words.sum() == len(text.split())


@pytest.fixture(scope="module")
def real_tokenizer(real_gguf_path):
    return load_tokenizer(real_gguf_path)


def test_byte_fallback_tokens_are_one_byte_each():
    for builder in (zoo.metaspace_byte_fallback, zoo.prepend_byte_fallback):
        found = pieces(load_tokenizer(builder()).encode_batch(["the 漢"]))
        assert found[-3:] == [b"\xe6", b"\xbc", b"\xa2"]
    sentencepiece = load_tokenizer(zoo.sentencepiece_llama_style()).encode_batch(["▁ the \x00漢 ꙮ"])
    assert pieces(sentencepiece)[-3:] == [b"\xea", b"\x99", b"\xae"]


def test_an_expanded_characters_bytes_go_to_its_first_token():
    """NFKC makes three characters of ½; only one token can own its two bytes."""
    found = pieces(load_tokenizer(zoo.unigram_nfkc()).encode_batch(["the ½"]))
    assert b"".join(found) == "the ½".encode()
    assert [piece for piece in found if "½".encode() in piece]
    assert all(piece == b"" for piece in found[found.index("½".encode()) + 1 :]) or (
        found[-1].endswith("½".encode())
    )


def test_what_no_token_covers_goes_to_the_token_that_follows():
    found = pieces(load_tokenizer(zoo.wordpiece_uncased()).encode_batch(["  the   dog  "]))
    assert b"".join(found) == b"  the   dog  "
    assert found[0].startswith(b"  ")
    assert found[-1].endswith(b"  ")  # nothing follows the last one


def test_spans_that_share_a_character_split_it_by_their_own_lengths():
    arrays = [np.array(row) for row in ([0, 1, 1, 1, 2], [1, 2, 2, 2, 4], [1, 1, 1, 1, -1])]
    assert bytes_from_spans("a漢bc", *arrays).tolist() == [1, 1, 1, 1, 2]
    # lengths that do not add up: the first has all
    arrays[2] = np.array([1, 1, 1, 7, -1])
    assert bytes_from_spans("a漢bc", *arrays).tolist() == [1, 3, 0, 0, 2]


@settings(deadline=None)
@given(st.lists(any_text, max_size=4))
def test_words_begin_where_split_finds_them(texts):
    """Against str.split() document by document: words never reach across documents."""
    utf8 = [text.encode() for text in texts]
    starts = np.cumsum([0, *map(len, utf8)])[:-1].astype(np.int64)
    found = word_starts(b"".join(utf8), starts)
    assert found.sum() == sum(len(text.split()) for text in texts)
    for text, start in zip(texts, starts.tolist(), strict=True):
        position = 0
        for word in text.split():
            position = text.index(word, position)
            assert found[start + len(text[:position].encode())]
            position += len(word)


def test_every_blank_of_unicode_separates_words():
    blanks = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    for blank in blanks:
        assert word_starts(f"a{blank}b".encode(), np.zeros(1, np.int64)).sum() == 2


@pytest.mark.trap(3)
def test_trap_3_the_bos_that_a_tokenizer_adds_is_found_and_not_in_the_ids():
    tokenizer = load_tokenizer(zoo.metaspace_byte_fallback())
    assert tokenizer.added_prefix == (1,)
    assert tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode_batch(["the dog"]).ids
    assert load_tokenizer(zoo.byte_level()).added_prefix == ()
    assert load_tokenizer(zoo.wordpiece_uncased()).added_prefix == (1,)
    assert load_tokenizer(zoo.wordpiece_uncased()).added_suffix == (2,)


def test_special_tokens_in_the_text_are_parsed_and_counted():
    tokenizer = load_tokenizer(zoo.byte_level())
    batch = tokenizer.encode_batch(["a<|endoftext|>b"])
    assert pieces(batch) == [b"a", b"<|endoftext|>", b"b"]
    assert tokenizer.num_special(batch.ids) == 1


def test_truncation_and_padding_are_switched_off_and_the_object_left_alone():
    source = zoo.byte_level()
    source.enable_truncation(3)
    source.enable_padding(length=50)
    text = "The quick brown fox jumps over the lazy dog."
    batch = load_tokenizer(source).encode_batch([text, "a"])
    assert batch.text_bytes == (text + "a").encode()
    assert len(batch.ids) < 50
    assert source.truncation["max_length"] == 3
    assert load_tokenizer(source).fingerprint == load_tokenizer(zoo.byte_level()).fingerprint


def test_the_fingerprint_follows_what_decides_the_ids():
    assert (
        load_tokenizer(zoo.byte_level()).fingerprint == load_tokenizer(zoo.byte_level()).fingerprint
    )
    different = [load_tokenizer(builder()).fingerprint for builder in zoo.FAMILIES.values()]
    assert len(set(different)) == len(different)


@pytest.mark.trap(34)
def test_trap_34_no_tokens_for_text_is_refused():
    empty = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(TokenizerError, match=r"no tokens for document 3.*vocab="):
        load_tokenizer(empty).encode_batch(["some text"], first_document=3)


@pytest.mark.trap(34)
def test_trap_34_a_vocabulary_that_was_never_read_is_refused():
    """What a wrong constructor argument leaves: a tokenizer that knows one token."""
    hollow = tokenizers.Tokenizer(
        models.BPE(vocab={"<|endoftext|>": 0}, merges=[], unk_token="<|endoftext|>", fuse_unk=True)
    )
    with pytest.raises(TokenizerError, match=r"into 1 tokens"):
        load_tokenizer(hollow).encode_batch(["The quick brown fox jumps over the lazy dog. " * 3])
    unknown = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    unknown.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match=r"unknown"):
        load_tokenizer(unknown).encode_batch(["The quick brown fox jumps over the lazy dog. " * 3])


def test_one_token_for_a_long_text_is_right_where_the_vocabulary_has_it():
    line = "-" * 80
    tokenizer = tokenizers.Tokenizer(models.WordLevel({line: 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert load_tokenizer(tokenizer).encode_batch([line]).ids.tolist() == [0]


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(CorpusError, match=r"Document 5.*lone surrogate.*U\+D800"):
        load_tokenizer(zoo.byte_level()).encode_batch(["a\ud800"], first_document=5)


@pytest.fixture
def folder(tmp_path):
    """A folder as transformers saves one, whose BOS only the configuration names."""
    tokenizer = zoo.metaspace_byte_fallback()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return tmp_path


def write_config(folder, **entries):
    content = {"tokenizer_class": "PreTrainedTokenizerFast"} | entries
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def test_a_folder_and_its_file_are_the_same_tokenizer(folder):
    from_folder, from_file = load_tokenizer(folder), load_tokenizer(str(folder / "tokenizer.json"))
    assert from_folder.fingerprint == from_file.fingerprint
    assert (from_folder.bos_id, from_folder.eos_id) == (1, 2)
    assert load_tokenizer(f"hf:{folder}").fingerprint == from_folder.fingerprint


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"bos_token": "<s>", "add_bos_token": False},
        {"bos_token": {"content": "<s>", "special": True, "__type": "AddedToken"}},
        {"bos_token": "<bos>", "eos_token": "▁the", "pad_token": "<pad>"},
        {"additional_special_tokens": ["<|x|>", "<|y|>"], "bos_token": "</s>"},
        {"added_tokens_decoder": {"900": {"content": "<new>", "special": False}}},
    ],
)
@pytest.mark.parametrize(
    "builder", [zoo.metaspace_byte_fallback, zoo.byte_level, zoo.wordpiece_uncased]
)
def test_a_folder_gives_what_auto_tokenizer_gives(tmp_path, entries, builder):
    transformers = pytest.importorskip("transformers")
    builder().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, **entries)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The dog <s>sleeps</s>; <|x|> <bos> <new><pad> the fox 漢字"
    plain = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch([text]).ids.tolist() == plain
    assert list(ours.added_prefix) + plain + list(ours.added_suffix) == theirs(text)["input_ids"]
    if theirs.bos_token_id is not None:
        assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert load_tokenizer(theirs).encode_batch([text]).ids.tolist() == plain


@pytest.mark.parametrize("name", ["tiny_llama_dir", "tiny_gpt2_dir", "tiny_gemma2_dir"])
def test_a_checkpoints_folder_gives_what_auto_tokenizer_gives(name, request):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(name)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "Größe  and\n\nwords"
    assert (
        list(ours.added_prefix) + ours.encode_batch([text]).ids.tolist()
        == theirs(text)["input_ids"]
    )
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.real_model
def test_a_gguf_is_converted_once_and_then_read_from_the_cache(
    real_gguf_path, tmp_path, monkeypatch
):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path))
    first = load_tokenizer(real_gguf_path)
    assert first.vocab_size == 49152
    assert (first.bos_id, first.eos_id, first.added_prefix) == (1, 2, ())
    monkeypatch.setattr(tokenizer_sources, "import_module", _refuse_import)
    assert load_tokenizer(f"gguf:{real_gguf_path}").fingerprint == first.fingerprint


def _refuse_import(name):
    raise ImportError(name)


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_sources, "import_module", _refuse_import)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingPackageError, match=r"pip install 'perplexit\[pytorch\]'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>")
    with pytest.raises(MissingPackageError, match=r"pip install 'perplexit\[sentencepiece\]'"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="There is no tokenizer"):
        load_tokenizer(tmp_path / "missing" / "tokenizer.json")
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version": "1.0"}')
    with pytest.raises(
        TokenizerError, match="a tokenizer that `tokenizers` or SentencePiece can read"
    ):
        load_tokenizer(broken)
    cut = tmp_path / "model.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" + b"\x00" * 7 + b"\x05" + b"\x00" * 15)
    with pytest.raises(TokenizerError, match="GGUF"):
        load_tokenizer(cut)
    with pytest.raises(TokenizerError, match="got int"):
        load_tokenizer(5)


def test_a_tokenizer_that_is_loaded_already_stays():
    tokenizer = load_tokenizer(zoo.byte_level())
    assert load_tokenizer(tokenizer) is tokenizer
    assert isinstance(tokenizer, Tokenizer)


def test_a_template_with_two_tokens_in_front_is_told():
    source = zoo.metaspace_byte_fallback()
    source.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert load_tokenizer(source).added_prefix == (2, 1)


def test_an_unknown_hub_id_is_one_request_and_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, str | None]] = []

    def unreachable(name: str, *, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        raise OSError("no route to the hub")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(TokenizerError, match=r"'nobody/nothing' here.*no route to the hub"):
        load_tokenizer("nobody/nothing@main")
    assert asked == [("nobody/nothing", "main")]

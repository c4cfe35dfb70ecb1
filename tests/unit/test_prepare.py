"""`prepare` end to end: what is fed, scored, skipped, counted and recorded."""

import json
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from perplexit.errors import CorpusError, EmptyScoreError, TokenizerError, UsageError
from perplexit.inputs.corpus_pass import _ahead
from perplexit.inputs.id_lines import export_id_lines, import_id_lines
from perplexit.inputs.preparing import prepare
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from tests.unit import tokenizer_zoo as zoo

TEXT = "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(zoo.byte_level())


@pytest.fixture(scope="module")
def adding_bos():
    """A tokenizer that adds a BOS (id 1) by itself, and whose EOS is another id."""
    return load_tokenizer(zoo.metaspace_byte_fallback())


def target_bytes(tokens):
    """The bytes of the scored tokens, in order."""
    found = []
    for index in range(tokens.num_windows):
        for token in tokens.target_tokens(index).tolist():
            start, stop = tokens.byte_starts[token : token + 2].tolist()
            found.append(bytes(tokens.text_bytes[start:stop]))
    return found


@pytest.mark.trap(3)
def test_trap_3_a_bos_that_the_tokenizer_adds_is_fed_exactly_once(adding_bos):
    tokens = prepare([TEXT, TEXT], tokenizer=adding_bos, max_length=16)
    assert tokens.spec["protocol"]["bos"] == "first"
    assert tokens.spec["protocol"]["prefix_id"] == 1
    fed = [tokens.window_ids(index).ids_T.tolist() for index in range(tokens.num_windows)]
    assert sum(ids.count(1) for ids in fed) == 2  # one a document
    assert 1 not in tokens.token_ids


@pytest.mark.trap(3)
@pytest.mark.parametrize("bos", ["first", "every"])
def test_trap_3_a_text_that_begins_with_the_bos_is_not_given_two(adding_bos, bos):
    tokens = prepare(["<s>" + TEXT, TEXT], tokenizer=adding_bos, max_length=16, bos=bos)
    assert tokens.token_ids[0] == 1  # verbatim: the text does begin with it
    assert tokens.spec["corpus"]["num_documents_with_own_bos"] == 1
    for index in range(tokens.num_windows):
        window = tokens.window_ids(index)
        assert window.ids_T.tolist().count(1) == int(bos == "every" or window.ids_T[0] == 1)
        assert window.ids_T[window.targets_N].tolist().count(1) == 0


@pytest.mark.trap(2)
def test_trap_2_bos_every_is_fed_before_every_window(adding_bos):
    tokens = prepare([TEXT], tokenizer=adding_bos, max_length=16, bos="every")
    assert tokens.num_windows > 3
    assert all(tokens.window_ids(i).ids_T[0] == 1 for i in range(tokens.num_windows))
    assert tokens.fed_lengths().max() == 16


@pytest.mark.trap(4)
def test_trap_4_the_prefix_is_the_bos_and_not_the_eos(adding_bos):
    assert adding_bos.bos_id == 1
    tokens = prepare([TEXT], tokenizer=adding_bos, bos="first")
    assert tokens.window_ids(0).ids_T[0] == 1


@pytest.mark.trap(4)
def test_trap_4_without_a_bos_token_the_eos_is_not_taken(tmp_path):
    zoo.byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="needs a tokenizer with a BOS token"):
        prepare([TEXT], tokenizer=tmp_path, bos="first")
    assert prepare([TEXT], tokenizer=tmp_path).spec["protocol"]["bos"] == "none"


@pytest.mark.trap(6)
def test_trap_6_an_inserted_bos_takes_no_tokens_place(adding_bos):
    """With BOS: one more target (the first token), and the ids of the text all there."""
    without = prepare([TEXT], tokenizer=adding_bos, protocol="document", bos="none")
    with_bos = prepare([TEXT], tokenizer=adding_bos, protocol="document", bos="first")
    assert with_bos.num_targets == without.num_targets + 1 == without.num_ids
    assert with_bos.window_ids(0).ids_T.tolist() == [1, *without.window_ids(0).ids_T.tolist()]


@pytest.mark.trap(8)
@pytest.mark.trap(13)
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text("ab .é漢\n", min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(2, 12),
    st.sampled_from(["none", "first", "every"]),
    st.sampled_from(["sliding", "disjoint"]),
)
def test_trap_8_and_13_the_denominator_is_what_is_scored(texts, max_length, bos, protocol):
    """Bytes and words recounted from the scored tokens themselves, not from another text."""
    source = zoo.metaspace_byte_fallback()
    try:
        tokens = prepare(texts, tokenizer=source, max_length=max_length, bos=bos, protocol=protocol)
    except EmptyScoreError:
        return
    times = np.zeros(tokens.num_ids, dtype=int)
    for index in range(tokens.num_windows):
        np.add.at(times, tokens.target_tokens(index), 1)
    assert times.sum() == tokens.num_targets == tokens.target_counts().sum()
    assert times.max() == 1
    if bos == "every" or (bos == "first" and protocol == "sliding"):
        assert times.min() == 1
        assert b"".join(target_bytes(tokens)) == "".join(texts).encode()
        assert int(tokens.num_words.sum()) == sum(len(text.split()) for text in texts)


def test_only_the_answers_tokens_are_scored(tokenizer):
    rows = [
        {"prompt": "What sleeps?", "text": " The dog sleeps."},
        {"prompt": "", "text": "the fox"},
        {"prompt": TEXT.strip(), "text": " over"},
    ]
    tokens = prepare(rows, tokenizer=tokenizer, prompt_key="prompt", max_length=16, bos="none")
    assert tokens.num_documents == 3
    scored = dict.fromkeys(range(3), b"")
    for index, window in enumerate(tokens.windows):
        for token in tokens.target_tokens(index).tolist():
            start, stop = tokens.byte_starts[token : token + 2].tolist()
            scored[window.document] += bytes(tokens.text_bytes[start:stop])
    assert scored[0] == b" The dog sleeps."
    assert b"the fox".endswith(scored[1])  # its first token has no context
    assert scored[2] == b" over"
    assert len(tokens.windows) < 6  # windows that lie in the prompt alone are not fed


def test_a_token_that_holds_a_byte_of_the_answer_is_scored(tokenizer):
    """Prompt and answer are tokenised jointly, so a token may straddle their border."""
    whole = prepare([TEXT], tokenizer=tokenizer)
    starts = whole.byte_starts.tolist()
    straddled = [t for t in range(2, 40) if starts[t + 1] - starts[t] >= 2]
    assert len(straddled) > 5
    for token in straddled:
        border = starts[token] + 1
        row = {"prompt": TEXT[:border], "text": TEXT[border:]}
        tokens = prepare([row], tokenizer=tokenizer, prompt_key="prompt")
        assert tokens.token_ids.tolist() == whole.token_ids.tolist()
        assert b"".join(target_bytes(tokens)).decode() == TEXT[starts[token] :]
        # a border between two tokens leaves the one before it out
        row = {"prompt": TEXT[: starts[token]], "text": TEXT[starts[token] :]}
        tokens = prepare([row], tokenizer=tokenizer, prompt_key="prompt")
        assert b"".join(target_bytes(tokens)).decode() == TEXT[starts[token] :]


@pytest.mark.trap(40)
def test_trap_40_skipped_documents_are_counted_by_reason(tmp_path):
    """Count in = count out + skipped, and the first few of each reason are named."""
    rows = [
        {"text": text} for text in ["a dog", "", None, "   ", "the fox", "", "", "", "", "", ""]
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = prepare(path, tokenizer=zoo.wordpiece_uncased(), bos="none")
    corpus = tokens.spec["corpus"]
    assert corpus["num_read"] == len(rows)
    assert corpus["skipped"] == {
        "blank, no tokens": {"count": 1, "first": [3]},
        "empty": {"count": 7, "first": [1, 5, 6, 7, 8]},
        "null": {"count": 1, "first": [2]},
    }
    skipped = sum(entry["count"] for entry in corpus["skipped"].values())
    assert tokens.num_documents + skipped == corpus["num_read"]
    assert bytes(tokens.text_bytes) == b"a dogthe fox"


@pytest.mark.trap(40)
def test_trap_40_joined_protocols_join_empty_rows_too(tokenizer):
    rows = ["", "The dog", "", "sleeps", ""]
    tokens = prepare(rows, tokenizer=tokenizer, protocol="mlc", max_length=8)
    assert bytes(tokens.text_bytes).decode() == "\n\n".join(rows)
    assert tokens.spec["corpus"]["num_read"] == 5
    assert tokens.num_documents == 1


@pytest.mark.trap(1)
def test_trap_1_the_joined_text_is_its_own_text(tokenizer):
    """The same rows, cut by another protocol, are another text: the fingerprints say so."""
    rows = ["The dog sleeps.", "The fox does not."]
    found = {
        name: prepare(rows, tokenizer=tokenizer, protocol=name, max_length=4).text_fingerprint
        for name in ("sliding", "disjoint", "mlc", "qefficient")
    }
    assert found["sliding"] == found["disjoint"] != found["mlc"] == found["qefficient"]
    joined = prepare(["\n\n".join(rows)], tokenizer=tokenizer)
    assert joined.text_fingerprint == found["mlc"]


@pytest.mark.trap(34)
def test_trap_34_a_text_that_gives_no_tokens_stops_the_preparation(tmp_path):
    source = zoo.wordpiece_uncased()
    with pytest.raises(TokenizerError, match="no tokens for document 1"):
        prepare(["a dog", "\x00\x01"], tokenizer=source, output=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trap(31)
@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_trap_31_every_protocol_declares_all_its_windows(tokenizer, name):
    """Whoever opens the file gets the windows; nobody builds them again from a length."""
    fixed = PROTOCOLS[name].fixed_length
    options = {} if fixed or name == "document" else {"max_length": 16}
    needs_bos = PROTOCOLS[name].prefix != "tokenizer"
    source = zoo.metaspace_byte_fallback() if needs_bos else tokenizer
    tokens = prepare([TEXT * (40 if fixed else 1)], tokenizer=source, protocol=name, **options)
    assert tokens.num_windows >= 1
    assert tokens.fed_lengths().sum() == sum(
        len(tokens.window_ids(i).ids_T) for i in range(tokens.num_windows)
    )
    recorded = tokens.spec["protocol"]
    assert (recorded["name"], recorded["version"]) == (name, PROTOCOLS[name].version)
    assert tokens.protocol == name


def test_domains_are_numbered_as_they_come(tokenizer):
    rows = [{"text": "The dog", "d": name} for name in ("news", "code", "news", "web")]
    tokens = prepare(rows, tokenizer=tokenizer, domain_key="d")
    assert tokens.domains == ("news", "code", "web")
    assert tokens.document_domains.tolist() == [0, 1, 0, 2]
    without = prepare(rows, tokenizer=tokenizer)
    assert without.domains == ()
    assert without.document_domains.tolist() == [-1] * 4


def test_conflicts_are_refused_before_anything_is_written(tokenizer, tmp_path):
    rows = [{"text": "a", "p": "b", "d": "c"}]
    for keys in ({"prompt_key": "p"}, {"domain_key": "d"}):
        with pytest.raises(UsageError, match="joins all documents"):
            prepare(rows, tokenizer=tokenizer, protocol="mlc", output=tmp_path / "x", **keys)
    with pytest.raises(UsageError, match="max_length"):
        prepare([TEXT], tokenizer=tokenizer, max_length=4, stride=5, output=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_score_is_an_error_with_advice(tokenizer, tmp_path):
    for texts, options in (
        (["a"], {}),
        ([TEXT], {"protocol": "qefficient", "max_length": 2048}),
        ([TEXT], {"protocol": "gptq-2048"}),
    ):
        with pytest.raises(EmptyScoreError, match=r"at least one token to score.*'sliding'"):
            prepare(texts, tokenizer=tokenizer, output=tmp_path / "x.safetensors", **options)
    for texts in ([], ["", ""]):
        with pytest.raises(CorpusError, match="no document with text"):
            prepare(texts, tokenizer=tokenizer, output=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_auto_with_two_tokens_in_front_asks():
    source = zoo.metaspace_byte_fallback()
    source.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(TokenizerError, match=r"2 tokens \[2, 1\] before a text"):
        prepare([TEXT], tokenizer=source)
    assert prepare([TEXT], tokenizer=source, bos="none").num_targets


def test_without_an_output_the_file_goes_with_the_object(tokenizer):
    tokens = prepare([TEXT], tokenizer=tokenizer)
    path = tokens.path
    assert TokenFile.open(path).input_fingerprint == tokens.input_fingerprint
    del tokens
    assert not path.exists()
    assert not path.parent.exists()


def test_many_batches_are_the_same_file_as_one(tokenizer, tmp_path, monkeypatch):
    rows = [
        {"p": "It's ", "text": f"{n} dogs é漢 {TEXT[: n * 7]}", "d": str(n % 3)} for n in range(25)
    ]
    options = {"tokenizer": tokenizer, "max_length": 16, "prompt_key": "p", "domain_key": "d"}
    one = prepare(rows, output=tmp_path / "one.safetensors", **options)
    monkeypatch.setattr("perplexit.inputs.corpus_pass._BATCH_DOCUMENTS", 4)
    seen = []
    many = prepare(
        rows,
        output=tmp_path / "many.safetensors",
        progress=lambda documents, ids: seen.append((documents, ids)),
        **options,
    )
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "many.safetensors"
    ).read_bytes()
    assert one.input_fingerprint == many.input_fingerprint
    assert [documents for documents, _ in seen] == [4, 8, 12, 16, 20, 24, 25]
    assert seen[-1][1] == many.num_ids


def test_one_changed_option_changes_the_fingerprint(tokenizer, adding_bos):
    base = {"tokenizer": tokenizer, "max_length": 16, "stride": 8}
    variants = [
        prepare([TEXT], **base),
        prepare([TEXT + "!"], **base),
        prepare([TEXT], **(base | {"stride": 4})),
        prepare([TEXT], **(base | {"max_length": 17})),
        prepare([TEXT], **(base | {"tokenizer": adding_bos})),
        prepare([TEXT], **(base | {"tokenizer": adding_bos, "bos": "none"})),
        prepare([TEXT], **(base | {"tokenizer": adding_bos, "bos": "every"})),
        prepare([TEXT], tokenizer=tokenizer, max_length=16, protocol="disjoint"),
    ]
    assert len({tokens.input_fingerprint for tokens in variants}) == len(variants)
    # auto, resolved, is the same thing as the policy it resolves to
    explicit = prepare([TEXT], bos="none", **base)
    assert explicit.input_fingerprint == variants[0].input_fingerprint


@pytest.mark.slow
def test_memory_stays_flat_over_a_long_corpus(tokenizer, monkeypatch):
    """Python's peak does not grow with the corpus: eight times the text, about the same peak."""
    monkeypatch.setattr("perplexit.inputs.corpus_pass._BATCH_CHARACTERS", 50_000)

    def peak(num_documents):
        tracemalloc.start()
        prepare((TEXT for _ in range(num_documents)), tokenizer=tokenizer, max_length=64)
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached

    assert peak(8_000) < 1.5 * peak(1_000)


def test_the_next_batch_is_encoded_while_one_is_written():
    begun = {number: threading.Event() for number in range(3)}

    def work(item):
        begun[item].set()
        return -item

    for item, made in _ahead(work, range(3)):
        assert made == -item
        assert item == 2 or begun[item + 1].wait(10)


def test_a_failing_batch_is_raised_in_its_turn():
    turns = _ahead(lambda item: 1 / (2 - item), range(5))
    assert [next(turns), next(turns)] == [(0, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(turns)


# --- id lines ------------------------------------------------------------------------------------


def test_id_lines_round_trip(tokenizer, tmp_path):
    tokens = prepare([TEXT, "The dog"], tokenizer=tokenizer, protocol="sliding", max_length=16)
    lines, again = tmp_path / "ids.txt", tmp_path / "again.txt"
    assert export_id_lines(tokens, lines) == tokens.num_windows
    read = import_id_lines(lines, output=tmp_path / "ids.safetensors", tokenizer=tokenizer)
    assert not read.has_text
    assert read.num_windows == tokens.num_windows
    assert read.tokenizer_fingerprint == tokens.tokenizer_fingerprint
    assert read.text_fingerprint == ""
    for index in range(read.num_windows):
        ids = tokens.window_ids(index).ids_T
        window = read.window_ids(index)
        assert window.ids_T.tolist() == ids.tolist()
        assert window.targets_N.tolist() == list(range(1, len(ids)))
    assert export_id_lines(read, again) == read.num_windows
    assert again.read_bytes() == lines.read_bytes()
    assert read.byte_starts.tolist() == [0] * (read.num_ids + 1)


def test_exported_lines_hold_the_prefix_that_is_fed(adding_bos, tmp_path):
    tokens = prepare([TEXT], tokenizer=adding_bos, max_length=16, bos="every")
    export_id_lines(tokens, tmp_path / "ids.txt")
    lines = (tmp_path / "ids.txt").read_text().splitlines()
    assert all(line.startswith("1 ") for line in lines)


def test_mlc_lines_score_what_the_protocol_scores(tokenizer, tmp_path):
    """The plain form loses nothing of `mlc`, whose windows score all ids but the first."""
    tokens = prepare([TEXT], tokenizer=tokenizer, protocol="mlc", max_length=16)
    export_id_lines(tokens, tmp_path / "ids.txt")
    read = import_id_lines(tmp_path / "ids.txt", output=tmp_path / "x.safetensors")
    assert read.target_counts().tolist() == tokens.target_counts().tolist()
    assert read.spec["protocol"]["aggregate"] == tokens.spec["protocol"]["aggregate"]


@pytest.mark.trap(40)
def test_trap_40_short_lines_are_counted(tmp_path):
    (tmp_path / "ids.txt").write_text("1 2 3\n7\n\n4 5\n")
    tokens = import_id_lines(tmp_path / "ids.txt", output=tmp_path / "x.safetensors")
    assert tokens.num_windows == 2
    assert tokens.spec["corpus"] == {
        "num_read": 4,
        "skipped": {"fewer than two ids": {"count": 2, "first": [2, 3]}},
    }
    assert tokens.vocab_size == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2\n3 x 4\n", r"ids\.txt, line 2 holds b?'x'"),
        ("1 -2\n", r"line 1 holds b?'-2'"),
        ("1 2\n99999 3\n", r"line 2 holds the id 99999. Expected ids below"),
        ("1 99999999999\n", r"line 1 holds the id 99999999999"),
    ],
)
def test_lines_that_are_no_ids_are_refused(tokenizer, tmp_path, content, message):
    (tmp_path / "ids.txt").write_text(content)
    with pytest.raises(CorpusError, match=message):
        import_id_lines(
            tmp_path / "ids.txt", output=tmp_path / "x.safetensors", tokenizer=tokenizer
        )
    assert [path.name for path in tmp_path.iterdir()] == ["ids.txt"]


def test_the_input_is_not_overwritten(tmp_path):
    (tmp_path / "ids.txt").write_text("1 2\n")
    with pytest.raises(UsageError, match="what this command reads"):
        import_id_lines(tmp_path / "ids.txt", output=tmp_path / "ids.txt")
    (tmp_path / "short.txt").write_text("1\n2\n")
    with pytest.raises(EmptyScoreError):
        import_id_lines(tmp_path / "short.txt", output=tmp_path / "x.safetensors")
    with pytest.raises(CorpusError, match="no such file"):
        import_id_lines(tmp_path / "missing.txt", output=tmp_path / "x.safetensors")

"""The token file: standard container, verified to the last bit, mapped, quick."""

import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.errors import TokenFileError
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.preparing import prepare
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TOKEN_FILE, TokenFileWriter
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.inputs.windows import PrefixMode
from perplexit.protected_outputs import OutputFile
from tests.unit import tokenizer_zoo as zoo

ROWS = [
    {"prompt": "The quick ", "text": "brown fox jumps over the lazy dog.", "source": "a"},
    {"prompt": "", "text": "Größe 漢字 🙂 and more words to read here", "source": "b"},
    {"prompt": "It's ", "text": "4 o'clock", "source": "a"},
]


def _writer(path):
    return TokenFileWriter(OutputFile(path, TOKEN_FILE), masked=False, has_text=False)


def _append(writer, batch, windows):
    documents = [Document("", "")] * (len(batch.document_starts) - 1)
    domains_D = np.full(len(documents), -1, np.int32)
    writer.append(batch, documents=documents, domains_D=domains_D, windows=windows)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(zoo.byte_level())


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("input") / "input.safetensors"
    prepare(
        ROWS,
        tokenizer=tokenizer,
        output=path,
        max_length=8,
        stride=4,
        prompt_key="prompt",
        domain_key="source",
    )
    return path


def test_the_safetensors_library_reads_it(path):
    from safetensors import safe_open  # noqa: PLC0415 - the library under test against

    tokens = TokenFile.open(path)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {
            "token_ids",
            "document_starts",
            "document_domains",
            "byte_starts",
            "num_words",
            "text_bytes",
            "windows",
            "scored_mask",
            "source_files",
            "source_rows",
        }
        np.testing.assert_array_equal(file.get_tensor("token_ids"), tokens.token_ids)
        np.testing.assert_array_equal(file.get_tensor("windows"), tokens.windows.array)
        np.testing.assert_array_equal(file.get_tensor("scored_mask"), tokens.scored_mask)
        assert json.loads(file.metadata()["spec"]) == tokens.spec
        assert file.metadata()["input_fingerprint"] == tokens.input_fingerprint


def test_every_tensor_is_mapped_and_aligned(path):
    tokens = TokenFile.open(path)
    for array in (tokens.token_ids, tokens.byte_starts, tokens.text_bytes, tokens.windows.array):
        assert array.flags.aligned
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_attributes_agree_with_the_documents(path):
    tokens = TokenFile.open(path)
    texts = [row["prompt"] + row["text"] for row in ROWS]
    assert bytes(tokens.text_bytes).decode() == "".join(texts)
    assert tokens.num_documents == 3
    assert tokens.domains == ("a", "b")
    assert tokens.document_domains.tolist() == [0, 1, 0]
    assert tokens.has_text
    assert tokens.num_ids == len(tokens.token_ids) == tokens.document_starts[-1]
    bounds = tokens.byte_starts[tokens.document_starts]
    assert [bytes(tokens.text_bytes[a:b]).decode() for a, b in pairwise(bounds)] == texts
    assert tokens.num_words.sum() == sum(len(text.split()) for text in texts)


def test_vectorised_counts_equal_window_by_window(path):
    tokens = TokenFile.open(path)
    windows = [tokens.window_ids(index) for index in range(tokens.num_windows)]
    assert tokens.fed_lengths().tolist() == [len(window.ids_T) for window in windows]
    assert tokens.target_counts().tolist() == [len(window.targets_N) for window in windows]
    assert tokens.num_targets == sum(len(window.targets_N) for window in windows)
    for index, window in enumerate(windows):
        assert window.index == index
        assert window.ids_T.dtype == np.int32
        assert window.targets_N.dtype == np.int64
        assert window.targets_N.min() >= 1
        np.testing.assert_array_equal(
            window.ids_T[window.targets_N], tokens.token_ids[tokens.target_tokens(index)]
        )


@pytest.mark.parametrize("bos", ["none", "first", "every"])
@pytest.mark.parametrize("protocol", ["sliding", "disjoint", "document"])
def test_fed_targets_are_the_documents_own_tokens(tokenizer, bos, protocol):
    source = zoo.metaspace_byte_fallback()
    max_length = None if protocol == "document" else 7
    tokens = prepare(
        [row["text"] for row in ROWS],
        tokenizer=source,
        protocol=protocol,
        max_length=max_length,
        bos=bos,
    )
    for index, row in enumerate(tokens.windows):
        window = tokens.window_ids(index)
        base = tokens.document_starts[row.document]
        np.testing.assert_array_equal(
            window.ids_T[window.targets_N], tokens.token_ids[tokens.target_tokens(index)]
        )
        inserted = row.prefix_mode is PrefixMode.INSERT
        assert (window.ids_T[0] == 1) == inserted
        np.testing.assert_array_equal(
            window.ids_T[int(inserted) :], tokens.token_ids[base + row.start : base + row.stop]
        )


def test_one_flipped_bit_anywhere_is_an_error(path, tmp_path_factory):
    original = path.read_bytes()
    damaged = tmp_path_factory.mktemp("damaged") / "input.safetensors"

    @settings(deadline=None, max_examples=400)
    @given(st.integers(0, len(original) * 8 - 1))
    def check(bit):
        content = bytearray(original)
        content[bit // 8] ^= 1 << (bit % 8)
        damaged.write_bytes(content)
        with pytest.raises(TokenFileError, match=r"input\.safetensors"):
            TokenFile.open(damaged)

    check()


def test_one_flipped_bit_in_the_header_is_an_error_bit_by_bit(path, tmp_path):
    """All bits of the header's length, of some of its JSON, and of its padding."""
    original = path.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    damaged = tmp_path / "input.safetensors"
    for byte in (*range(8), *range(8, end, 13), *range(end - 8, end + 8)):
        for bit in range(8):
            content = bytearray(original)
            content[byte] ^= 1 << bit
            damaged.write_bytes(content)
            with pytest.raises(TokenFileError):
                TokenFile.open(damaged)


@pytest.mark.parametrize("cut", [-1, -100, 7, 8, 20, 0])
def test_a_file_that_was_cut_short_is_an_error(path, tmp_path, cut):
    damaged = tmp_path / "short.safetensors"
    damaged.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TokenFileError, match=r"short\.safetensors"):
        TokenFile.open(damaged)


def test_bytes_behind_the_end_are_an_error(path, tmp_path):
    damaged = tmp_path / "long.safetensors"
    damaged.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TokenFileError, match="cut short or added to"):
        TokenFile.open(damaged)


def test_the_message_names_the_damaged_tensor(path, tmp_path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # text_bytes come last
    damaged = tmp_path / "input.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(TokenFileError, match="'text_bytes' is not what was written"):
        TokenFile.open(damaged)


def test_other_files_are_told_apart(tmp_path, path):
    from safetensors.numpy import save_file  # noqa: PLC0415

    other = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3, np.int32)}, other, metadata={"format": "pt"})
    with pytest.raises(TokenFileError):
        TokenFile.open(other)
    text = tmp_path / "text.txt"
    text.write_text("Just a text, not a token file.")
    with pytest.raises(TokenFileError, match="prepare it first: perplexit prepare"):
        TokenFile.open(text)
    with pytest.raises(TokenFileError, match="no such file"):
        TokenFile.open(tmp_path / "missing.safetensors")


def test_the_file_says_nothing_of_paths_and_times(path, tmp_path, tokenizer):
    """Prepared again elsewhere, it is the same file to the last bit."""
    again = tmp_path / "elsewhere.safetensors"
    options = {"max_length": 8, "stride": 4, "prompt_key": "prompt", "domain_key": "source"}
    prepare(ROWS, tokenizer=tokenizer, output=again, **options)
    assert again.read_bytes() == path.read_bytes()


def test_a_copy_opens_and_has_the_same_fingerprint(path, tmp_path):
    copy = shutil.copy(path, tmp_path / "copy.safetensors")
    assert TokenFile.open(copy).input_fingerprint == TokenFile.open(path).input_fingerprint


def test_text_fingerprint_frames_documents(tokenizer):
    def fingerprint(texts):
        return prepare(texts, tokenizer=tokenizer).text_fingerprint

    assert fingerprint(["abab", "cdcd"]) != fingerprint(["aba", "bcdcd"])
    assert fingerprint(["abab", "cdcd"]) == fingerprint(["abab", "cdcd"])
    assert fingerprint(["e\u0301\u0301"]) != fingerprint(["\xe9\u0301"])


def test_text_fingerprint_does_not_depend_on_the_tokenizer(tokenizer):
    texts = ["The quick brown fox"]
    others = [prepare(texts, tokenizer=build()) for build in (zoo.word_level, zoo.unigram_nfkc)]
    ours = prepare(texts, tokenizer=tokenizer)
    assert {other.text_fingerprint for other in others} == {ours.text_fingerprint}
    assert len({other.tokenizer_fingerprint for other in (ours, *others)}) == 3
    assert len({other.input_fingerprint for other in (ours, *others)}) == 3


@pytest.mark.parametrize(
    "row",
    [
        [0, 0, 4, 0, 4, 0, -1],  # scores the id that is fed first
        [0, 0, 4, 0, 4, 2, 9],  # scores the id that the prefix overwrites
        [0, 0, 5, 1, 5, 0, -1],  # reaches behind its document
        [1, 0, 4, 1, 4, 0, -1],  # no such document
        [0, 2, 4, 1, 4, 0, -1],  # a target before the window
        [0, 0, 3, 1, 4, 0, -1],  # a target behind the window
        [0, 0, 4, 1, 1, 0, -1],  # nothing to score
        [0, 0, 4, 1, 4, 3, 9],  # unknown prefix mode
        [0, 0, 4, 1, 4, 1, -1],  # a prefix without an id
        [0, 0, 4, 1, 4, 0, 9],  # an id without a prefix
    ],
)
def test_a_window_that_cannot_be_is_refused(tmp_path, row):
    batch = EncodedBatch.without_text(np.arange(4, dtype=np.int32), [4])
    with (
        _writer(tmp_path / "x.safetensors") as writer,
        pytest.raises(TokenFileError, match="outside its document or scores a token"),
    ):
        _append(writer, batch, np.array([row]))


@pytest.mark.trap(6)
def test_trap_6_overwrite_and_insert_feed_and_score_what_they_say(tmp_path):
    """INSERT feeds every id; OVERWRITE loses the first, which is never scored."""
    batch = EncodedBatch.without_text(np.array([10, 11, 12, 13] * 2, dtype=np.int32), [4, 4])
    rows = np.array([[0, 0, 4, 0, 4, 1, 9], [1, 0, 4, 1, 4, 2, 9]])
    spec = {"protocol": {"name": "test"}, "domains": [], "tokenizer": {"vocab_size": 14}}
    with _writer(tmp_path / "x.safetensors") as writer:
        _append(writer, batch, rows)
        tokens = writer.finish(spec, tokenizer_fingerprint="")
    insert, overwrite = tokens.window_ids(0), tokens.window_ids(1)
    assert insert.ids_T.tolist() == [9, 10, 11, 12, 13]
    assert insert.targets_N.tolist() == [1, 2, 3, 4]
    assert overwrite.ids_T.tolist() == [9, 11, 12, 13]
    assert overwrite.targets_N.tolist() == [1, 2, 3]
    assert tokens.target_counts().tolist() == [4, 3]
    assert tokens.fed_lengths().tolist() == [5, 4]
    assert tokens.token_ids.tolist() == [10, 11, 12, 13] * 2  # the file itself is untouched


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path):
    with _writer(tmp_path / "x.safetensors"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_finishing_replaces_an_older_file_in_one_step(tmp_path, tokenizer):
    path = tmp_path / "x.safetensors"
    older = prepare(["An older text."], tokenizer=tokenizer, output=path)
    newer = prepare(["A newer text."], tokenizer=tokenizer, output=path, force=True)
    assert TokenFile.open(path).input_fingerprint == newer.input_fingerprint
    assert bytes(older.text_bytes) == b"An older text."  # who holds the old one keeps it
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_verifying_a_file_does_not_hold_it_in_memory(tmp_path):
    """A page of the map that was touched counts as the process's own: none is, until it is used."""
    ids = np.arange(5_000_000, dtype=np.int32)
    path = tmp_path / "x.safetensors"
    rows = np.array([[0, 0, 4, 1, 4, 0, -1]])
    spec = {"protocol": {"name": "test"}, "domains": [], "tokenizer": {"vocab_size": len(ids)}}
    with _writer(path) as writer:
        batch = EncodedBatch.without_text(ids, [len(ids)])
        _append(writer, batch, rows)
        writer.finish(spec, tokenizer_fingerprint="")
    assert path.stat().st_size > 64e6
    before = _mapped_bytes()
    tokens = TokenFile.open(path)
    assert _mapped_bytes() - before < 4e6
    assert int(np.asarray(tokens.token_ids).sum()) == int(ids.sum(dtype=np.int64))
    assert _mapped_bytes() - before > 16e6  # so they would have been seen


def _mapped_bytes():
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("RssFile"))

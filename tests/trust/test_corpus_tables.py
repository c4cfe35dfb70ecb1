"""Tables and compressed texts: every row read as it is, or an error that names file and place."""

import bz2
import contextlib
import gzip
import json
import lzma
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import CorpusError, UsageError
from perplexit.inputs.corpus import documents
from perplexit.inputs.corpus_document import Keys

ROWS = [
    {"id": 7, "text": 'He said "no",\nand\tleft.', "lang": "en"},
    {"id": 8, "text": "Ein Maß für Überraschung; 🙂", "lang": "de"},
    {"id": 9, "text": "  blanks at both ends ", "lang": "en"},
]
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
PACKED = [suffix for suffix in PACK if suffix]


def texts(path, **keys):
    return [document.text for document in documents(path, Keys(**keys))]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows, delimiter: str, end: str = "\n") -> bytes:
    """RFC 4180, every field in quotes."""
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    quoted = [delimiter.join('"' + f.replace('"', '""') + '"' for f in row) for row in table]
    return (end.join(quoted) + end).encode()


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_d3_csv_and_tsv_are_tables(tmp_path, name, delimiter, packed):
    path = tmp_path / (name + packed)
    path.write_bytes(PACK[packed](b"\xef\xbb\xbf" + delimited(ROWS, delimiter)))
    found = list(documents(path, Keys(domain="lang", prompt="id", keep=("id",))))
    assert [d.text for d in found] == [row["text"] for row in ROWS]
    assert [(d.domain, d.prompt, d.kept) for d in found] == [
        (row["lang"], str(row["id"]), (str(row["id"]),)) for row in ROWS
    ]
    path.write_bytes(PACK[packed](delimited(ROWS, delimiter, "\r\n")))
    assert texts(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("packed", PACKED)
def test_d3_compressed_json_of_lines_is_read(tmp_path, packed):
    path = tmp_path / f"c4.json{packed}"
    path.write_bytes(PACK[packed](lines(ROWS)))
    assert texts(path) == [row["text"] for row in ROWS]
    assert texts(tmp_path) == texts(path)  # in a folder too, as Dolma ships it
    path.write_bytes(PACK[packed](json.dumps(ROWS, indent=1).encode()))
    assert texts(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["rows.jsonl", "own.txt", "rows.csv", "rows.json"])
def test_d3_a_damaged_file_is_an_error_and_never_a_shorter_corpus(tmp_path, packed, name):
    """Cut at every place, or one byte changed: the same documents as before, or an error."""
    data = {
        "rows.jsonl": lines(ROWS * 3),
        "own.txt": b"A text of some length, over and over. " * 9,
        "rows.csv": delimited(ROWS * 3, ","),
        "rows.json": lines(ROWS * 3),
    }[name]
    whole = PACK[packed](data)
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(whole)
    expected = texts(path)
    rng = np.random.default_rng(len(whole))
    cuts = [whole[:n] for n in range(0, len(whole), 7)]
    flips = [
        whole[:n] + bytes([whole[n] ^ 0x10]) + whole[n + 1 :]
        for n in rng.integers(0, len(whole), 40).tolist()
    ]
    if packed == ".zst":  # written without a checksum, as is usual: a flip may go unseen
        flips = []
    for damaged in [*cuts, *flips, whole + b"garbage", whole + whole[: len(whole) // 2]]:
        path.write_bytes(damaged)
        try:
            found = texts(path)
        except CorpusError as error:
            found = expected if path.name in str(error) else str(error)
        # Some bytes of a header (gzip's time and system) mean nothing, so no error is right too.
        assert found == expected


@pytest.mark.parametrize("packed", PACKED)
def test_d3_sibling_several_members_are_one_stream(tmp_path, packed):
    first, second = lines(ROWS[:2]), lines(ROWS[2:])
    path = tmp_path / f"rows.jsonl{packed}"
    path.write_bytes(PACK[packed](first) + PACK[packed](second))
    assert texts(path) == [row["text"] for row in ROWS]
    half = len(first) // 2  # a row across two members
    path.write_bytes(PACK[packed](first[:half]) + PACK[packed](first[half:] + second))
    assert texts(path) == [row["text"] for row in ROWS]
    big = lines(ROWS) * 20_000
    path.write_bytes(PACK[packed](big) + PACK[packed](b"") + PACK[packed](second))
    assert sum(1 for _ in documents(path, Keys())) == 60_001


def test_d3_sibling_padding_behind_gzip_is_no_damage(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS)) + bytes(600_000))
    assert texts(path) == [row["text"] for row in ROWS]


def test_d3_sibling_a_suffix_that_lies_is_named(tmp_path):
    for suffix, other in (("gz", "zst"), ("zst", "xz"), ("bz2", "gz"), ("xz", "bz2")):
        path = tmp_path / f"rows.jsonl.{suffix}"
        path.write_bytes(PACK[f".{other}"](lines(ROWS)))
        with pytest.raises(CorpusError, match=rf"rows\.jsonl\.{suffix}.*got \.{other} data"):
            texts(path)
        path.write_bytes(lines(ROWS))
        with pytest.raises(CorpusError, match="got something else"):
            texts(path)
        path.write_bytes(b"")
        with pytest.raises(CorpusError, match="an empty file"):
            texts(path)
    for name in ("rows.jsonl", "own.txt", "rows.csv"):
        (tmp_path / name).write_bytes(gzip.compress(lines(ROWS)))
        with pytest.raises(CorpusError, match=rf"{name}.*compressed data.*\.gz"):
            texts(tmp_path / name)
    (tmp_path / "poem.txt").write_text("BZh begins no bzip2 file here.")
    assert texts(tmp_path / "poem.txt") == ["BZh begins no bzip2 file here."]


def test_d3_the_command_says_it_in_one_line(tmp_path, byte_tokenizer_json):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS * 99))[:-20])
    output = tmp_path / "x.safetensors"
    arguments = ["prepare", path, "--tokenizer", byte_tokenizer_json, "-o", output]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 1
    assert "rows.jsonl.gz" in result.stderr
    assert "decompressed bytes" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("text_key", "text"), ("text_key", "page"), ("domain_key", "d"), ("prompt_key", "p")],
)
def test_d3_an_option_that_nothing_reads_is_an_error(tmp_path, byte_tokenizer_json, option, value):
    path = tmp_path / "own.txt"
    path.write_text("A text.")
    with pytest.raises(UsageError, match="a text without columns"):
        px.prepare(path, tokenizer=byte_tokenizer_json, **{option: value})
    with pytest.raises(UsageError, match="without columns"):
        px.prepare(tmp_path, tokenizer=byte_tokenizer_json, keep="id")
    assert px.prepare(path, tokenizer=byte_tokenizer_json).num_documents == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,n\na,1\nb\n", r"line 3 has 1 fields, expected 2"),
        (b"text,n\na,1,2\n", r"line 2 has 3 fields, expected 2"),
        (b'text,n\n"a\nb",1\n"open,2\n', r"line 4: a row begins that is no CSV"),
        (b'text,n\n"a"b,1\n', r"line 2: a row begins that is no CSV"),
        (b"body,n\na,1\n", r"line 1 has no 'text'. Its keys: 'body', 'n'"),
        (b"text,text\na,1\n", r"names the column 'text' twice"),
        (b"text\na\n\xff\n", r"line 3 is not UTF-8: byte 7 \(0xFF\)"),
        (b"", r"is empty. Expected a first line"),
        ("text\nä\n".encode("utf-16"), r"line 1 is not UTF-8: byte 0 \(0xFF\).*UTF-16"),
    ],
)
def test_d3_sibling_a_csv_file_that_is_none_says_where(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        texts(path)


def test_d3_sibling_long_fields_and_nuls_are_read(tmp_path):
    long = "word " * 1_000_000
    path = tmp_path / "rows.csv"
    path.write_bytes(delimited([{"text": long}, {"text": "a\0b"}], ","))
    assert texts(path) == [long, "a\0b"]


def test_d3_sibling_wrong_encodings_name_the_byte_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = lines(ROWS[:1])
    path.write_bytes(first + '{"text": "Maß"}\n'.encode("latin-1"))
    with pytest.raises(CorpusError, match=rf"line 2 is not UTF-8: byte {len(first) + 12} \(0xDF\)"):
        texts(path)
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le"):
        (tmp_path / "own.txt").write_bytes("Plain words.".encode(encoding))
        with pytest.raises(CorpusError, match=r"own\.txt is not UTF-8: every other byte is NUL"):
            texts(tmp_path / "own.txt")


def test_d3_sibling_json_that_hurts_parsers(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in ("[" * 100_000, '{"text": ' * 100_000, '{"text": "a", "n": ' + "9" * 5000 + "}"):
        path.write_text('{"text": "first"}\n' + line + "\n")
        with pytest.raises(CorpusError, match="line 2"):
            texts(path)
    path.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(CorpusError, match=r"rows\.jsonl, line 1.*lone surrogate"):
        px.prepare(path, tokenizer=_bytes())


def _bytes():
    from tests.tiny_models import byte_tokenizer  # noqa: PLC0415 - imports torch

    return byte_tokenizer()


def test_d3_sibling_parquet_of_every_text_type_and_of_others(tmp_path):
    path = tmp_path / "rows.parquet"
    plain = pa.array(["a", None, "c"])
    for column in (plain, plain.cast(pa.large_string()), plain.dictionary_encode()):
        pq.write_table(pa.table({"text": column}), path)
        assert texts(path) == ["a", None, "c"]
    others = {
        "int": pa.array([1, 2]),
        "list": pa.array([["a"], ["b"]]),
        "bytes": pa.array([b"a", b"b"]),
        "dict": pa.array([{"a": 1}, {"a": 2}]),
    }
    for name, column in others.items():
        pq.write_table(pa.table({"text": column}), path)
        with pytest.raises(CorpusError, match=rf"row 0: 'text' holds a {name}"):
            texts(path)
    pq.write_table(pa.table({"text": ["word " * 50] * 5000}), path, compression="snappy")
    data = bytearray(path.read_bytes())
    for place in range(100, len(data) - 100, max(1, len(data) // 25)):
        damaged = data.copy()
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(CorpusError):  # and no other error
            texts(path)


def test_d3_sibling_rows_that_lack_the_key_or_hold_a_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"body": "b"}]))
    with pytest.raises(CorpusError, match=r"item 1 has no 'text'"):
        texts(path)
    path.write_text(json.dumps([{"text": "a"}, {"text": 5}]))
    with pytest.raises(CorpusError, match=r"item 1: 'text' holds a int"):
        texts(path)
    path.write_text(json.dumps(["a"]))
    with pytest.raises(CorpusError, match=r"item 0 holds a str"):
        texts(path)


def test_d3_sibling_gzip_written_raw_by_zlib_is_no_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(zlib.compress(lines(ROWS)))
    with pytest.raises(CorpusError, match="got something else"):
        texts(path)

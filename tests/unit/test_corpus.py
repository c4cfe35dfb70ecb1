"""Documents from every source: verbatim, streamed, and with the place in every message."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perplexit.errors import CorpusError, UsageError
from perplexit.inputs.corpus import documents
from perplexit.inputs.corpus_document import Keys

TEXTS = ["First text.", "", "Größe 漢字 🙂\r\n\ttabs\u2028", "last"]


def texts(corpus, **keys):
    return [document.text for document in documents(corpus, Keys(**keys))]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.trap(1)
@pytest.mark.parametrize(
    "content",
    [b"\r\n a \r b \n\n", b"\xef\xbb\xbfwith a BOM", "\u2028\x85\x1c\x00".encode(), b"", b" \n"],
)
def test_trap_1_a_text_file_is_one_verbatim_document(tmp_path, content):
    """No newline translation, no stripping, the byte order mark kept."""
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert [text.encode() for text in texts(path)] == [content]
    assert [text.encode() for text in texts(str(path))] == [content]


def test_bytes_that_are_no_utf8_are_refused_with_their_offset(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9 latte")
    with pytest.raises(CorpusError, match=r"latin1\.txt is not UTF-8: byte 3 \(0xE9\)"):
        texts(path)
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(CorpusError, match=r"rows\.jsonl, line 2 is not UTF-8: byte 30 \(0xE9\)"):
        texts(lines)


def test_jsonl_and_parquet_hold_a_document_a_row(tmp_path):
    rows = [{"text": text, "n": index} for index, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert texts(path) == TEXTS
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    assert texts(tmp_path / "rows.parquet") == TEXTS


def test_compressed_jsonl(tmp_path):
    plain = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS]).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain))
    with pa.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as file:
        file.write(plain)
    assert texts(tmp_path / "rows.jsonl.gz") == TEXTS
    assert texts(tmp_path / "rows.jsonl.zst") == TEXTS


def test_blank_lines_and_a_bom_in_jsonl_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}')
    assert texts(path) == ["a", "b"]


def test_keys_name_the_columns(tmp_path):
    rows = [{"q": "Q1", "a": "A1", "from": "x"}, {"q": "", "a": "A2", "from": 7}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = list(documents(path, Keys("a", "from", "q")))
    assert [(d.text, d.domain, d.prompt) for d in found] == [("A1", "x", "Q1"), ("A2", "7", "")]
    assert found[1].origin.endswith("rows.jsonl, line 2")


@pytest.mark.parametrize(
    ("keys", "row", "message"),
    [
        ({}, {"body": "x", "id": 1}, r"line 1 has no 'text'. Its keys: 'body', 'id'"),
        ({"domain": "d"}, {"text": "x"}, r"line 1 has no 'd'"),
        ({"prompt": "p"}, {"text": "x", "p": None}, r"'p' holds a NoneType"),
        ({"domain": "d"}, {"text": "x", "d": None}, r"'d' holds a NoneType"),
        ({}, {"text": 5}, r"line 1: 'text' holds a int"),
        ({}, ["text"], r"line 1 holds a list"),
    ],
)
def test_a_row_that_lacks_something_is_refused_by_file_and_line(tmp_path, keys, row, message):
    with pytest.raises(CorpusError, match=message):
        texts(write_jsonl(tmp_path / "rows.jsonl", [row]), **keys)


def test_a_line_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(CorpusError, match=r"line 2 is no JSON"):
        texts(path)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(CorpusError, match=r"rows\.parquet has no 'text'. Its keys: 'body', 'id'"):
        texts(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(CorpusError, match="cannot be read as Parquet"):
        texts(path)


def test_null_texts_come_out_as_none(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    assert texts(path) == ["a", None, "b"]


def test_a_folder_is_read_sorted_and_recursively(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "a.txt", "B.text"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "c.jsonl", [{"text": "row 1"}, {"text": "row 2"}])
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    expected = ["B.text", "a/b/c.md", "a/z.txt", "a.txt", "b.txt", "row 1", "row 2"]
    assert texts(tmp_path) == expected


def test_several_paths_are_read_in_the_order_given(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert texts([tmp_path / "b.txt", tmp_path / "a.txt"]) == ["b.txt", "a.txt"]


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"no file or folder.*\['text'\]"):
        texts("Some text that is meant as itself.")
    with pytest.raises(CorpusError, match="no file of a known kind"):
        texts(tmp_path)
    (tmp_path / "rows.json").write_text('{\n  "text": "a"\n}\n')
    with pytest.raises(CorpusError, match=r"rows\.json, line 1 is no JSON.*one object a line"):
        texts(tmp_path / "rows.json")
    with pytest.raises(UsageError, match="got int"):
        texts(5)
    with pytest.raises(UsageError, match="one split of a dataset"):
        texts({"train": [], "test": []})
    with pytest.raises(UsageError, match="item 0 of the list is a int"):
        texts([5])


@pytest.mark.parametrize("text", ["— " * 120, "a" * 254, "a\0b", "x" * 300])
def test_a_text_that_no_file_can_be_named_like_is_a_text(text):
    assert texts([text]) == [text]


def test_a_list_of_file_names_is_not_scored_as_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("content")
    with pytest.raises(UsageError, match=r"is the name of a file.*pathlib\.Path"):
        texts([str(path)])


def test_text_without_columns_has_no_domain(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="one document without columns"):
        texts(tmp_path / "a.txt", domain="source")
    with pytest.raises(UsageError, match="texts have no 'prompt'"):
        texts(["text"], prompt="prompt")


def test_datasets_objects():
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text, "source": "x", "n": index} for index, text in enumerate(TEXTS)]
    dataset = datasets.Dataset.from_list(rows)
    assert texts(dataset) == TEXTS
    assert [d.domain for d in documents(dataset, Keys(domain="source"))] == ["x"] * 4
    assert texts(dataset.to_iterable_dataset()) == TEXTS
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert texts(stream) == TEXTS
    with pytest.raises(CorpusError, match=r"the dataset has no 'body'. Its keys: 'text'"):
        texts(dataset, text="body")
    with pytest.raises(UsageError, match="one split"):
        texts(datasets.DatasetDict({"test": dataset}))


def test_memory_stays_flat_over_a_long_file(tmp_path):
    """Peak memory over 40,000 rows (8 MB) is that of a few: nothing is collected."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(40_000):
            file.write(json.dumps({"text": f"{number} " * 30}) + "\n")
    tracemalloc.start()
    count = sum(1 for _ in documents(path, Keys()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 1_000_000

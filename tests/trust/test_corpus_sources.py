"""A document keeps its place: the file, its row, and the columns that were asked for."""

import csv
import json
import math
from datetime import date
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import CorpusError, PerplexitError, TokenFileError, UsageError
from perplexit.inputs.tensor_container import TensorSpool, read_container
from perplexit.inputs.token_file import LAYOUT
from tests.toy_sessions import BigramSession

ROWS = [
    {"text": "The first text has some words.", "id": "a-1", "score": 0.5, "n": 1},
    {"text": "", "id": "a-2", "score": 1.5, "n": 2},
    {"text": None, "id": "a-3", "score": 2.5, "n": 3},
    {"text": "The fourth text, after two that are skipped.", "id": "a-4", "score": None, "n": 4},
    {"text": "The fifth.", "id": "a-5", "score": 4.5, "n": 5},
]


def write_rows(folder):
    """The rows as JSON Lines with a blank line, as CSV and as Parquet."""
    lines = [json.dumps(row) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS[0])
        writer.writerows(row.values() for row in ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_d2_a_document_knows_its_file_row_and_kept_columns(tmp_path, byte_tokenizer_json, name):
    write_rows(tmp_path)
    path = tmp_path / name
    tokens = px.prepare(
        path, tokenizer=byte_tokenizer_json, keep=["id", "n"], output=tmp_path / "x.safetensors"
    )
    rows = [0, 4, 5] if name == "rows.jsonl" else [0, 3, 4]  # the blank line counts as a row
    number = str if name == "rows.csv" else int
    assert [tokens.sources.of(d) for d in range(3)] == [
        {"source_file": str(path), "source_row": row, "id": f"a-{n}", "n": number(n)}
        for row, n in zip(rows, (1, 4, 5), strict=True)
    ]
    counts = {reason: entry["count"] for reason, entry in tokens.spec["corpus"]["skipped"].items()}
    assert counts == ({"empty": 2} if name == "rows.csv" else {"empty": 1, "null": 1})
    assert sorted(chain.from_iterable(tokens.sources.skipped.values())) == [
        [str(path), 1],
        [str(path), 2],
    ]


def test_d2_the_fingerprint_is_the_contents_alone(tmp_path, byte_tokenizer_json):
    write_rows(tmp_path)
    found = {
        (name, keep): px.prepare(tmp_path / name, tokenizer=byte_tokenizer_json, keep=keep)
        for name in ("rows.jsonl", "rows.parquet")
        for keep in ((), ("id",), ("id", "score"))
    }
    assert len({tokens.input_fingerprint for tokens in found.values()}) == 1
    plain = px.prepare([row["text"] or "" for row in ROWS], tokenizer=byte_tokenizer_json)
    assert plain.text_fingerprint == next(iter(found.values())).text_fingerprint
    assert [plain.sources.of(d) for d in range(3)] == [
        {"source_file": None, "source_row": row} for row in (0, 3, 4)
    ]


def test_d2_an_older_token_file_still_opens_with_its_fingerprint(tmp_path, byte_tokenizer_json):
    """As it was written before sources were recorded: tensors and metadata without them."""
    tokens = px.prepare(["Some text."], tokenizer=byte_tokenizer_json)
    metadata, tensors = read_container(tokens.path)
    old = {key: value for key, value in metadata.items() if not key.startswith("source")}
    with TensorSpool(tmp_path / "old.safetensors", LAYOUT) as spool:
        for name in LAYOUT:
            spool.append(name, tensors[name])
        spool.assemble(old)
    opened = px.TokenFile.open(tmp_path / "old.safetensors")
    assert opened.sources is None
    assert opened.input_fingerprint == tokens.input_fingerprint
    run = px.evaluate(BigramSession(), opened, run=tmp_path / "run")
    px.export_documents(run.folder, tmp_path / "d.jsonl")
    assert "source_row" not in json.loads((tmp_path / "d.jsonl").read_text())


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_d2_exports_carry_the_source(tmp_path, byte_tokenizer_json, suffix):
    write_rows(tmp_path)
    options = ["--tokenizer", byte_tokenizer_json, "--keep", "id", "--keep", "score"]
    runner = CliRunner()
    arguments = ["prepare", tmp_path / "rows.jsonl", *options, "-o", tmp_path / "x.safetensors"]
    result = runner.invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    run = px.evaluate(BigramSession(), tmp_path / "x.safetensors", run=tmp_path / "run")
    where = {d: (str(tmp_path / "rows.jsonl"), r) for d, r in enumerate((0, 4, 5))}
    kept = {0: ("a-1", 0.5), 1: ("a-4", None), 2: ("a-5", 4.5)}
    for option in ((), ("--words",), ("--documents",)):
        output = tmp_path / f"table{len(option)}{''.join(option)}.{suffix}"
        arguments = ["runs", "export", run.folder, *option, "-o", output]
        result = runner.invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        rows = _read(output)
        assert {int(row["document"]) for row in rows} == {0, 1, 2}
        for row in rows:
            document = int(row["document"])
            assert (row["source_file"], int(row["source_row"])) == where[document]
            score = None if row["score"] in (None, "") else float(row["score"])
            assert (row["id"], score) == kept[document]
    documents = _read(output)
    nll = run.tokens.nll.astype("float64")
    for row in documents:
        own = nll[run.tokens.document == int(row["document"])]
        assert int(row["num_tokens"]) == len(own)
        assert float(row["nll_sum"]) == pytest.approx(own.sum(), rel=1e-12)
        assert float(row["perplexity"]) == pytest.approx(math.exp(own.mean()), rel=1e-12)


def _read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else list(map(json.loads, file))


def test_d2_sibling_every_message_counts_the_files_own_rows(tmp_path):
    """Two documents are skipped before the one that is wrong."""
    from tests.tiny_models import byte_tokenizer  # noqa: PLC0415 - imports torch

    lines = ['{"text": ""}', "", '{"text": null}', '{"text": "good"}', '{"text": "\\udc00"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CorpusError, match=r"rows\.jsonl, line 5 is not Unicode text"):
        px.prepare(path, tokenizer=byte_tokenizer())


def test_d2_sibling_files_of_a_folder_and_lines_of_ids(tmp_path, byte_tokenizer_json):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("The first.")
    (folder / "empty.txt").write_text("")
    (folder / "deep" / "z.md").write_text("The last.")
    tokens = px.prepare(folder, tokenizer=byte_tokenizer_json)
    found = [tokens.sources.of(d) for d in range(tokens.num_documents)]
    assert found == [
        {"source_file": str(folder / "a.txt"), "source_row": 0},
        {"source_file": str(folder / "deep" / "z.md"), "source_row": 0},
    ]
    (tmp_path / "ids.txt").write_text("1 2 3\n7\n\n4 5\n")
    imported = px.import_id_lines(tmp_path / "ids.txt", output=tmp_path / "ids.safetensors")
    assert [imported.sources.of(d)["source_row"] for d in range(2)] == [0, 3]


def test_d2_sibling_kept_columns_of_any_type(tmp_path, byte_tokenizer_json):
    rows = [
        {"text": "one", "tags": ["x", "y"], "day": date(2026, 1, 2), "x": float("nan"), "nll": 1},
        {"text": "two", "tags": [], "day": None, "x": 2.5, "nll": 2},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    keep = ["tags", "day", "x", "nll"]
    tokens = px.prepare(
        path, tokenizer=byte_tokenizer_json, keep=keep, output=tmp_path / "x.safetensors"
    )
    assert tokens.sources.kept(0) == [["x", "y"], "2026-01-02", "nan", 1]
    run = px.evaluate(BigramSession(), tokens, run=tmp_path / "run")
    for suffix in ("csv", "jsonl", "parquet"):
        px.export_tokens(run.folder, tmp_path / f"t.{suffix}")
        row = _read(tmp_path / f"t.{suffix}")[0]
        assert row["tags"] == '["x","y"]'
        assert int(row["kept_nll"]) == 1  # the run's own `nll` keeps its name
        assert float(row["nll"]) > 0


def test_d2_sibling_columns_that_are_not_there_or_lost(tmp_path, byte_tokenizer_json):
    write_rows(tmp_path)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(CorpusError, match=r"line 1 has no 'absent'"):
        px.prepare(path, tokenizer=byte_tokenizer_json, keep="absent")
    with pytest.raises(UsageError, match="kept columns are lost"):
        px.prepare(path, tokenizer=byte_tokenizer_json, keep="id", protocol="hf-guide")
    with pytest.raises(UsageError, match="each column to keep once"):
        px.prepare(path, tokenizer=byte_tokenizer_json, keep=["id", "id"])
    with pytest.raises(UsageError, match="texts have no 'id'"):
        px.prepare(["a text"], tokenizer=byte_tokenizer_json, keep="id")
    # the column with the text may be kept as well
    assert px.prepare(path, tokenizer=byte_tokenizer_json, keep="text").sources.kept(0)


def test_d2_sibling_sources_are_verified_like_the_rest(tmp_path, byte_tokenizer_json):
    write_rows(tmp_path)
    output = tmp_path / "x.safetensors"
    px.prepare(tmp_path / "rows.jsonl", tokenizer=byte_tokenizer_json, keep="id", output=output)
    data = output.read_bytes()
    for place in (data.index(b'["a-4"]') + 3, data.index(b"rows.jsonl"), data.index(b'"skipped')):
        changed = bytearray(data)
        changed[place] ^= 1
        output.write_bytes(changed)
        with pytest.raises(TokenFileError):
            px.TokenFile.open(output)
    run = px.evaluate(BigramSession(), px.prepare(["a text"], tokenizer=byte_tokenizer_json),
                      run=tmp_path / "run")  # fmt: skip
    (run.folder / "documents.parquet").write_bytes(b"PAR1")
    with pytest.raises(PerplexitError, match="the documents of a run"):
        px.export_tokens(run.folder, tmp_path / "t.csv")

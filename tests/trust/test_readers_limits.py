"""Absurd numbers are refused at once (D8), and small files that declare much take little (D7)."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import ModelError, RunError, TokenizerError, UsageError
from perplexit.inputs.gguf_header_check import metadata_fingerprint
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.sessions.loss_file_formats import read_recording
from perplexit.untrusted_files import Expected
from perplexit.untrusted_tensors import read_parquet
from tests.toy_sessions import BigramSession
from tests.unit import tokenizer_zoo as zoo

HUGE = str(2**63)
EXPECTED = Expected("a table", RunError, "make it again")


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "model", "input", "--threads", "1000000"],
        ["eval", "model", "input", "--threads", HUGE],
        ["eval", "model", "input", "--batch-size", HUGE],
        ["eval", "model", "input", "--top-k", HUGE],
        ["eval", "model", "input", "--mode", "cached", "--prompt-len", HUGE],
        ["eval", "model", "input", "--confidence", "nan"],
        ["prepare", "text", "--tokenizer", "t", "-o", "out", "--max-length", HUGE],
        ["prepare", "text", "--tokenizer", "t", "-o", "out", "--stride", HUGE],
        ["prepare", "text", "--tokenizer", "t", "-o", "out", "--max-length", "-1"],
        ["compile", "model", "--to", "onnx", "-o", "out", "--max-length", HUGE],
        ["compile", "model", "--to", "onnx", "-o", "out", "--batch-size", HUGE],
        ["doctor", "model", "--threads", "1000000"],
        ["doctor", "model", "--max-length", HUGE],
        ["compare", "a", "b", "--confidence", "inf"],
        ["compare", "a", "b", "--noise-floor", "nan"],
        ["compare", "a", "b", "--most-changed", HUGE],
        ["report", "a", "-o", "b", "--confidence", "nan"],
        ["igf", "collect", "x", "--model", "m", "-o", "y", "--seed", str(2**64)],
        ["igf", "collect", "x", "--model", "m", "-o", "y", "--context-length", HUGE],
    ],
)
def test_d8_an_absurd_number_is_a_usage_error_at_once(arguments):
    began = time.perf_counter()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    said = (result.output + result.stderr).replace("_", "-")
    assert arguments[-2].removeprefix("--") in said
    assert time.perf_counter() - began < 5  # no engine was imported for it


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 1_000_000),
        ("threads", 0),
        ("threads", True),
        ("threads", 2.0),
        ("batch_size", 2**63),
        ("top_k", -1),
        ("top_k", 2**70),
        ("prompt_len", 2**63),
        ("decode_chunk", "3"),
    ],
)
def test_d8_sibling_the_same_in_python(name, value):
    with pytest.raises(UsageError, match=name):
        px.evaluate(BigramSession(), "input.safetensors", mode="cached", **{name: value})


def test_d8_sibling_lengths_of_windows_in_python(tmp_path):
    for name in ("max_length", "stride"):
        for value in (2**63, -(2**63), 1.5, True):
            with pytest.raises(UsageError, match=name):
                px.prepare(["text"], tokenizer=zoo.byte_level(), **{name: value})
    with pytest.raises(UsageError, match="threads"):
        px.load_session("hf:somewhere", threads=1_000_000)


def test_d8_a_run_whose_input_is_cut_off_ends_in_words(tmp_path):
    """In a process of its own, as the fault was a signal: 100 windows, cut off after the third."""
    script = f"""
import os
import perplexit as px
from perplexit.errors import PerplexitError
from tests.toy_sessions import BigramSession
from tests.unit import tokenizer_zoo as zoo
path = {str(tmp_path / "input.safetensors")!r}
tokens = px.prepare(["some words to score " * 4000], tokenizer=zoo.byte_level(), output=path,
                    max_length=64, stride=32)
class Cut(BigramSession):
    def token_nll(self, windows):
        if len(self.batches) == 2:
            os.truncate(path, 4096)
        return super().token_nll(windows)
try:
    px.evaluate(Cut(details=False), tokens, batch_size=4, run={str(tmp_path / "run")!r})
except PerplexitError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "TokenFileError" in done.stdout
    assert "changed meanwhile" in done.stdout
    parts = list((tmp_path / "run" / "parts").iterdir())
    assert parts, "what was scored before stays"


class _Peak:
    """Bytes that the process's memory rose by while inside."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *_):
        with open("/proc/self/status") as status:
            peak = next(int(x.split()[1]) * 1024 for x in status if x.startswith("VmHWM"))
        self.num_bytes = peak - self._before


def gguf_of_49_bytes() -> bytes:
    """No tensors, one pair: a key of one letter with an array of 2**40 strings."""
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**40)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair


@pytest.mark.parametrize(
    "data",
    [
        gguf_of_49_bytes(),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(32),  # tensors
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(32),  # pairs
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(32),  # a key
    ],
)
def test_d7_a_tiny_gguf_that_declares_much_takes_little(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    began = time.perf_counter()
    with _Peak() as peak, pytest.raises(TokenizerError, match="cannot be understood"):
        metadata_fingerprint(path)
    assert peak.num_bytes < 64 << 20
    assert time.perf_counter() - began < 5


def test_d7_sibling_a_gguf_tensor_beyond_the_end_of_the_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    from perplexit.quantization.gguf_header import read_gguf_header  # noqa: PLC0415 - needs gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("a.weight", np.ones((20, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "model.gguf"
    assert read_gguf_header(path).num_parameters == 160
    data = bytearray(path.read_bytes())
    at = data.index(b"a.weight") + 8 + 4
    data[at : at + 8] = struct.pack("<Q", 2**40)
    path.write_bytes(data)
    with _Peak() as peak, pytest.raises(ModelError, match="beyond the end"):
        read_gguf_header(path)
    assert peak.num_bytes < 64 << 20


@pytest.mark.parametrize("where", ["vocab", "added_tokens"])
def test_d7_a_tokenizer_with_an_id_of_200_million_takes_little(tmp_path, where):
    zoo.metaspace_byte_fallback().save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    if where == "vocab":
        content["model"]["vocab"]["z"] = 200_000_000
    else:
        token = {"id": 200_000_000, "content": "<z>", "special": True, "single_word": False}
        content["added_tokens"].append(
            {**token, "lstrip": False, "rstrip": False, "normalized": False}
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with _Peak() as peak:
        try:
            assert (
                load_tokenizer(tmp_path).vocab_size < 100_000
            )  # the library may number added tokens anew
        except TokenizerError as error:
            assert "200,000,000" in str(error)  # noqa: PT017
    assert peak.num_bytes < 128 << 20


def test_d7_a_parquet_file_of_a_billion_rows_takes_little(tmp_path):
    """1,000 row groups of a million zeros each."""
    path = tmp_path / "r.parquet"
    table = pa.table({"window": pa.array(np.zeros(1_000_000, np.int64))})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(1_000):
            writer.write_table(table)
    assert path.stat().st_size < 6_000_000  # of 8 GB that it unfolds to
    with _Peak() as peak, pytest.raises(RunError, match="unfold"):
        read_parquet(path, EXPECTED)
    assert peak.num_bytes < 256 << 20
    with pytest.raises(ModelError):
        read_recording(path)


def test_d7_sibling_one_long_text_repeated_in_a_dictionary_takes_little(tmp_path):
    path = tmp_path / "r.parquet"
    text = pa.DictionaryArray.from_arrays(np.zeros(2_000_000, np.int32), ["x" * 100_000])
    pq.write_table(pa.table({"text": text.cast(text.type)}), path, store_schema=False)
    assert path.stat().st_size < 200_000
    with _Peak() as peak, pytest.raises(RunError, match="unfold"):
        read_parquet(path, EXPECTED)
    assert peak.num_bytes < 256 << 20


def test_d7_sibling_a_recording_with_one_wide_position_takes_little(tmp_path):
    """One position that lists 100,000 alternatives would make every other as wide."""
    ids, logprobs = list(range(100_000)), [-20.0] * 100_000
    first = {"window": 0, "ids": [1, 2], "logprobs": [None, -1.0]}
    rest = [2] * 50_000
    record = {
        "window": 1,
        "ids": rest,
        "logprobs": [None] + [-1.0] * (len(rest) - 1),
        "top_ids": [ids] + [None] * (len(rest) - 1),
        "top_logprobs": [logprobs] + [None] * (len(rest) - 1),
    }
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(first) + "\n" + json.dumps(record) + "\n", "utf-8")
    with _Peak() as peak, pytest.raises(ModelError, match="alternatives"):
        read_recording(path)
    assert peak.num_bytes < 256 << 20

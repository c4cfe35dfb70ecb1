"""Damaged files on disk end in one stated error that names the file (fault D6)."""

import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit.checkpoints.adapters import find_adapter
from perplexit.checkpoints.identity import read_config, weight_files
from perplexit.cli.app import app
from perplexit.errors import ModelError, PerplexitError, RunError, TokenizerError, VocabularyError
from perplexit.inputs.kl_base_file import MAGIC, KlBaseFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.program_record import ProgramMetadata
from perplexit.reference.states import FOLDER, ReferenceStates, StatesWriter
from perplexit.runs.run_tokens import RunTokens
from perplexit.sessions.loss_file_formats import read_recording
from tests.proofs.fuzz.readers import READERS, fresh_copy
from tests.report_runs import toy_runs
from tests.unit import tokenizer_zoo as zoo

HOSTILE = {
    "nested": "[" * 100_000 + "]" * 100_000,
    "digits": '{"schema_version": ' + "9" * 5_000 + "}",
    "half": r'{"schema_version": 1, "status": "\ud800"}',
    "list": "[1, 2]",
    "number": "7",
    "null": "null",
    "empty": "",
    "binary": "\x00\x01\x02",
    "twice": '{"engine": "onnx", "engine": "hf"}',
    "nan": '{"format_version": NaN}',
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer.json"
    zoo.byte_level().save(str(tokenizer))
    toy_runs(folder, ["A text to score, twice over.", "And one more."], tokenizer, max_length=16)
    (folder / "noise-0.4").rename(folder / "other")
    return folder


@pytest.fixture
def runs(sound, tmp_path):
    return fresh_copy(sound, tmp_path / "runs")


def record_hash_again(run):
    record = json.loads((run / "run.json").read_text("utf-8"))
    record["tokens_sha256"] = hashlib.sha256((run / "tokens.parquet").read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(record), "utf-8")


def damage_tokens(run, how):
    path = run / "tokens.parquet"
    data = path.read_bytes()
    table = pq.read_table(path)
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        middle = len(data) // 3
        path.write_bytes(data[:middle] + bytes(8) + data[middle + 8 :])
        return  # the hash tells: Parquet's pages carry no checksum of their own
    elif how == "other":
        path.write_bytes(b"not a table at all")
    elif how == "column":
        pq.write_table(table.drop_columns(["nll"]), path)
    elif how == "type":
        place = table.column_names.index("document")
        strings = pa.array(["x"] * table.num_rows)
        pq.write_table(table.set_column(place, "document", strings), path)
    elif how == "negative":
        place = table.column_names.index("window")
        values = pa.array(np.full(table.num_rows, -5, np.int32))
        pq.write_table(table.set_column(place, "window", values), path)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
        return
    if path.is_file():
        record_hash_again(run)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "how", ["cut", "flipped", "other", "column", "type", "negative", "folder", "pipe"]
)
def test_d6_damaged_tokens_in_export_compare_verify_and_report(runs, tmp_path, how):
    damage_tokens(runs / "other", how)
    for command in (
        ["runs", "export", str(runs / "other"), "-o", str(tmp_path / "t.csv")],
        ["runs", "export", str(runs / "other"), "--words", "-o", str(tmp_path / "w.csv")],
        ["runs", "verify", str(runs / "other")],
        ["compare", str(runs / "full"), str(runs / "other")],
        ["report", str(runs / "full"), str(runs / "other"), "-o", str(tmp_path / "r.html")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1, (command, result.output)
        assert isinstance(result.exception, SystemExit), (command, result.exception)
        assert "Error: " in result.output + result.stderr
        assert "other" in result.output + result.stderr, command
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("rows", ["every row", "one row"])
@pytest.mark.parametrize("column", ["document", "window", "byte_start", "token_id", "nll"])
def test_d6_sibling_a_token_table_whose_rows_lack_a_value(runs, column, rows):
    path = runs / "other" / "tokens.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    lacking = np.arange(table.num_rows) >= (0 if rows == "every row" else table.num_rows - 1)
    values = pa.array(table.column(column).to_numpy(), table.schema.field(column).type, lacking)
    pq.write_table(table.set_column(place, column, values), path)
    with pytest.raises(RunError, match=f"the column {column} with rows that have no value"):
        RunTokens.read(path)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_d6_a_run_record_and_one_bad_folder_in_the_list(runs, content):
    (runs / "other" / "run.json").write_text(content, "utf-8")
    with pytest.raises(RunError, match="other"):
        px.Run.open(runs / "other")
    result = CliRunner().invoke(app, ["runs", "list", str(runs), "--json"])
    assert result.exit_code == 0, result.output
    listed = {row["folder"]: row for row in json.loads(result.stdout)}
    assert listed[str(runs / "full")]["status"] == "complete"
    bad = listed[str(runs / "other")]
    assert bad["status"] == "unreadable"
    assert "other" in bad["reason"]
    assert "unreadable" in result.stderr


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("perplexity",), "18.3", r"\$\.perplexity"),
        (("num_tokens",), None, "num_tokens"),
        (("num_tokens",), True, "num_tokens"),
        (("model",), [], r"\$\.model"),
        (("model", "address"), 7, r"\$\.model\.address"),
        (("session", "engine"), None, r"\$\.session\.engine"),
        (("warnings",), "none", r"\$\.warnings"),
        (("domains",), [3], r"\$\.domains"),
        (("input_spec", "protocol"), "sliding", "protocol"),
        (("seconds", "total"), "1", "seconds"),
    ],
)
def test_d6_sibling_a_run_record_of_wrong_types(runs, keys, value, words):
    path = runs / "other" / "run.json"
    record = json.loads(path.read_text("utf-8"))
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(RunError, match=words):
        px.Run.open(runs / "other")


def test_d6_sibling_a_run_record_that_is_a_pipe_or_a_folder(runs):
    path = runs / "other" / "run.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RunError, match="named pipe"):
        px.Run.open(runs / "other")
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="a folder"):
        px.Run.open(runs / "other")


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_d6_a_reference_record(tmp_path, content):
    writer = StatesWriter(tmp_path / FOLDER)
    writer.add([0], [np.ones((3, 4), np.float32)])
    writer.finish({"weights_fingerprint": "w"})
    assert ReferenceStates(tmp_path).windows == {0}
    (tmp_path / FOLDER / "reference.json").write_text(content, "utf-8")
    with pytest.raises(RunError, match=r"reference\.json"):
        ReferenceStates(tmp_path)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.json"])
def test_d6_recordings_and_their_sidecars(tmp_path, name, content):
    (tmp_path / "r.jsonl").write_text('{"window": 0, "ids": [1, 2], "logprobs": [null, -1]}\n')
    (tmp_path / "r.jsonl.json").write_text("{}")
    assert read_recording(tmp_path / "r.jsonl")
    (tmp_path / name).write_text(content, "utf-8")
    if (name, content) in {("r.jsonl", HOSTILE["empty"]), ("r.jsonl", "null")}:
        content = None  # no line, no window: told where a window is asked for
    try:
        read_recording(tmp_path / "r.jsonl")
    except PerplexitError as error:
        assert "r.jsonl" in str(error)  # noqa: PT017
    else:
        assert content is None or "schema_version" not in content or "NaN" not in content


def test_d6_a_base_file_with_an_id_beyond_its_vocabulary(tmp_path):
    path = tmp_path / "base.kld"
    (reader,) = (each for each in READERS if each.name == "kl-base-file")
    reader.make(tmp_path)
    assert KlBaseFile(path).ids.shape == (3, 8)
    data = bytearray(path.read_bytes())
    at = len(MAGIC) + 12 + 4 * 13
    for wrong in (11, 5000, -1):
        data[at : at + 4] = np.array([wrong], "<i4").tobytes()
        path.write_bytes(data)
        with pytest.raises(VocabularyError, match=f"the id {wrong} in chunk 1"):
            px.load_session(f"recorded:{path}")


def test_d6_sibling_a_base_file_whose_rows_are_no_log_probabilities(tmp_path):
    (reader,) = (each for each in READERS if each.name == "kl-base-file")
    for value in (np.nan, np.inf, -3.0, 1.0):
        reader.make(tmp_path)
        path = tmp_path / "base.kld"
        data = bytearray(path.read_bytes())
        at = len(MAGIC) + 12 + 4 * 24
        data[at : at + 4] = np.array([value], "<f4").tobytes()
        path.write_bytes(data)
        with pytest.raises(ModelError, match="no log-probabilities"):
            KlBaseFile(path).rows(0, 0, 3)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_d6_a_program_record(tmp_path, content):
    (tmp_path / "program.json").write_text(content, "utf-8")
    with pytest.raises(ModelError):
        ProgramMetadata.read(tmp_path)
    with pytest.raises(PerplexitError):
        px.load_session(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {"length": "16"}},
        {"model": {"address": "x"}},
        {"files": [{"name": "../model.onnx", "num_bytes": 1, "sha256": "a"}]},
        {"files": {"name": "model.onnx"}},
        {"perplexity": 1},
        {"quantization": []},
    ],
)
def test_d6_sibling_a_program_record_of_wrong_types(tmp_path, change):
    (reader,) = (each for each in READERS if each.name == "program")
    reader.make(tmp_path)
    path = tmp_path / "program.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(ModelError, match=r"program\.json.*\$"):
        ProgramMetadata.read(tmp_path)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_d6_adapter_and_model_configurations(tmp_path, content):
    for name in ("adapter", "checkpoint"):
        (reader,) = (each for each in READERS if each.name == name)
        (tmp_path / name).mkdir()
        reader.make(tmp_path / name)
        reader.read(tmp_path / name)
    (tmp_path / "adapter" / "adapter_config.json").write_text(content, "utf-8")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        find_adapter(tmp_path / "adapter")
    (tmp_path / "checkpoint" / "model.safetensors.index.json").write_text(content, "utf-8")
    with pytest.raises(ModelError, match=r"index\.json"):
        weight_files(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text(content, "utf-8")
    if "NaN" not in content:  # transformers itself writes NaN and Infinity into config.json
        with pytest.raises(ModelError, match=r"config\.json"):
            read_config(tmp_path / "checkpoint")


@pytest.mark.parametrize("value", ["320", True, -1, 1e9, {}, 2**60])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_d6_sibling_a_model_configuration_of_wrong_types(tmp_path, name, value):
    (reader,) = (each for each in READERS if each.name == "checkpoint")
    reader.make(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {name: value}), "utf-8")
    with pytest.raises(ModelError, match=name):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "configuration",
    [
        {"bos_token": 3},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"0": "a"}},
        {"added_tokens_decoder": []},
        {"additional_special_tokens": "a"},
        {"extra_special_tokens": [3]},
    ],
)
def test_d6_sibling_a_tokenizer_configuration_of_wrong_types(tmp_path, configuration):
    zoo.byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration), "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json.*\$\."):
        load_tokenizer(tmp_path)


def test_d6_sibling_what_is_no_regular_file_is_refused_by_every_reader(tmp_path):
    """A named pipe in the place of each file: nothing waits for a writer."""
    for name in ("program", "recording-lines", "kl-base-file", "igf-experiment", "id-lines"):
        (reader,) = (each for each in READERS if each.name == name)
        sound_files = tmp_path / name / "sound"
        sound_files.mkdir(parents=True)
        reader.make(sound_files)
        case = fresh_copy(sound_files, tmp_path / name / "case")
        for path in [each for each in case.iterdir() if each.is_file()]:
            path.unlink()
            os.mkfifo(path)
        with pytest.raises(PerplexitError):
            reader.read(case)
        shutil.rmtree(case)

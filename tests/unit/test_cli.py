"""Commands as translations: every option reaches the library, and every error is one message.

The library is replaced by a recorder here; test_cli_effects.py runs the real thing.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import perplexit as px
from perplexit.cli.app import app
from perplexit.cli.demo_files import packaged_file
from perplexit.cli.output import running_figures
from perplexit.compilation.targets import CompiledProgram
from perplexit.errors import GateError, MissingPackageError, ModelError, UsageError
from perplexit.program_record import (
    ProgramFile,
    ProgramMemory,
    ProgramMetadata,
    ProgramModel,
    ProgramQuantization,
    ProgramShapes,
    ProgramVerification,
)
from perplexit.runs.run import SCHEMA_VERSION, Run

PREPARE = ["prepare", "text.txt", "--tokenizer", "T", "-o", "out.safetensors"]
EVAL = ["eval", "M", "in.safetensors"]
COMPARE = ["compare", "reference", "candidate"]
COMPILE = ["compile", "M", "--to", "onnx", "-o", "out"]
EXPLAIN = ["explain", "a", "b"]
DOCTOR = ["doctor", "M", "in.safetensors"]
REPORT = ["report", "a", "b", "-o", "report.html"]

# command, the option as given, the verb it reaches, the keyword and the value that arrive there
DOCUMENTS = ["runs", "export", "r", "-o", "d.csv", "--documents"]
WORDS = ["runs", "export", "r", "-o", "w.csv", "--words"]
TRANSLATIONS: list[tuple[list[str], list[str], str, str, Any]] = [
    (PREPARE, ["--tokenizer", "U"], "prepare", "tokenizer", "U"),
    (PREPARE, ["-o", "other"], "prepare", "output", Path("other")),
    (PREPARE, ["--protocol", "mlc"], "prepare", "protocol", "mlc"),
    (PREPARE, ["--max-length", "77"], "prepare", "max_length", 77),
    (PREPARE, ["--stride", "11"], "prepare", "stride", 11),
    (PREPARE, ["--bos", "every"], "prepare", "bos", "every"),
    (PREPARE, ["--text-key", "page"], "prepare", "text_key", "page"),
    (PREPARE, ["--domain-key", "field"], "prepare", "domain_key", "field"),
    (PREPARE, ["--prompt-key", "question"], "prepare", "prompt_key", "question"),
    (PREPARE, ["--keep", "id", "--keep", "n"], "prepare", "keep", ["id", "n"]),
    (PREPARE, ["--force"], "prepare", "force", True),
    (PREPARE, ["--from-ids"], "import_id_lines", "tokenizer", "T"),
    (PREPARE, ["--from-ids"], "import_id_lines", "output", Path("out.safetensors")),
    (PREPARE, ["--export-ids", "ids.txt"], "export_id_lines", "1", Path("ids.txt")),
    (PREPARE, ["--check-overlap", "data.txt"], "ngram_overlap", "1", Path("data.txt")),
    (EVAL, ["--run", "somewhere"], "evaluate", "run", Path("somewhere")),
    (EVAL, ["--dtype", "bf16"], "evaluate", "dtype", "bf16"),
    (EVAL, ["--quantization", "int4"], "evaluate", "quantization", "int4"),
    (EVAL, ["--batch-size", "3"], "evaluate", "batch_size", 3),
    (EVAL, ["--batch-size", "auto"], "evaluate", "batch_size", "auto"),
    (EVAL, ["--mode", "cached"], "evaluate", "mode", "cached"),
    (EVAL, ["--prompt-len", "7"], "evaluate", "prompt_len", 7),
    (EVAL, ["--decode-chunk", "3"], "evaluate", "decode_chunk", 3),
    (EVAL, ["--device", "cuda:1"], "evaluate", "device", "cuda:1"),
    (EVAL, ["--threads", "2"], "evaluate", "threads", 2),
    (EVAL, ["--adapter", "lora"], "evaluate", "adapter", Path("lora")),
    (EVAL, ["--merge-adapter"], "evaluate", "merge_adapter", True),
    (EVAL, ["--attention", "eager"], "evaluate", "attention", "eager"),
    (EVAL, ["--head", "liger"], "evaluate", "head", "liger"),
    (EVAL, ["--compile", "default"], "evaluate", "compile_mode", "default"),
    (EVAL, ["--device-map", "map.json"], "evaluate", "device_map", Path("map.json")),
    (EVAL, ["--tensor-parallel", "2"], "evaluate", "tensor_parallel", 2),
    (EVAL, ["--top-k", "5"], "evaluate", "top_k", 5),
    (EVAL, ["--confidence", "0.9"], "evaluate", "confidence", 0.9),
    (EVAL, ["--on-non-finite", "count"], "evaluate", "on_non_finite", "count"),
    (EVAL, ["--save-reference"], "evaluate", "save_reference", True),
    (EVAL, ["--reference-dtype", "float16"], "evaluate", "reference_dtype", "float16"),
    (EVAL, ["--reference", "runs/r"], "evaluate", "reference", "runs/r"),
    (EVAL, ["--measure-noise-floor"], "evaluate", "measure_noise_floor", True),
    (EVAL, ["--other-tokenizer"], "evaluate", "other_tokenizer", True),
    (COMPARE, ["--confidence", "0.9"], "compare_runs", "confidence", 0.9),
    (COMPARE, ["--most-changed", "3"], "compare_runs", "num_most_changed", 3),
    (COMPARE, ["--noise-floor", "0.01"], "compare_runs", "noise_floor", 0.01),
    (COMPARE, ["--margin", "1%"], "compare_runs", "margin", "1%"),
    (COMPARE, ["--gate", "fp16"], "compare_runs", "gates", ["fp16"]),
    (COMPARE, ["--gate-on", "value"], "compare_runs", "gates_on", "value"),
    (COMPILE, ["--force"], "compile", "force", True),
    (REPORT, ["--force"], "write_report", "force", True),
    (WORDS, ["--force"], "export_words", "force", True),
    (DOCUMENTS, ["--documents"], "export_documents", "1", Path("d.csv")),
    (COMPILE, ["--to", "tvm"], "compile", "to", "tvm"),
    (COMPILE, ["-o", "there"], "compile", "output", Path("there")),
    (COMPILE, ["--quantization", "int4"], "compile", "quantization", "int4"),
    (COMPILE, ["--no-perplexity"], "compile", "perplexity", False),
    (COMPILE, ["--dtype", "fp16"], "compile", "dtype", "fp16"),
    (COMPILE, ["--max-length", "64"], "compile", "max_length", 64),
    (COMPILE, ["--batch-size", "2"], "compile", "batch_size", 2),
    (COMPILE, ["--device", "cuda"], "compile", "device", "cuda"),
    (EXPLAIN, ["--input", "moved"], "explain", "inputs", [Path("moved")]),
    (EXPLAIN, ["--model", "hf:there"], "explain", "model", ["hf:there"]),
    (EXPLAIN, ["--no-measure"], "explain", "measure", False),
    (DOCTOR, ["--tokenizer", "T"], "doctor", "tokenizer", "T"),
    (DOCTOR, ["--max-length", "99"], "doctor", "max_length", 99),
    (DOCTOR, ["--dtype", "bf16"], "doctor", "dtype", "bf16"),
    (DOCTOR, ["--quantization", "int4"], "doctor", "quantization", "int4"),
    (DOCTOR, ["--device", "cuda:1"], "doctor", "device", "cuda:1"),
    (DOCTOR, ["--threads", "2"], "doctor", "threads", 2),
    (DOCTOR, ["--adapter", "lora"], "doctor", "adapter", Path("lora")),
    (DOCTOR, ["--merge-adapter"], "doctor", "merge_adapter", True),
    (DOCTOR, ["--attention", "eager"], "doctor", "attention", "eager"),
    (DOCTOR, ["--head", "liger"], "doctor", "head", "liger"),
    (DOCTOR, ["--compile", "default"], "doctor", "compile_mode", "default"),
    (DOCTOR, ["--device-map", "map.json"], "doctor", "device_map", Path("map.json")),
    (DOCTOR, ["--tensor-parallel", "2"], "doctor", "tensor_parallel", 2),
    (REPORT, ["-o", "other.html"], "write_report", "1", Path("other.html")),
    (REPORT, ["--label", "a", "--label", "b"], "write_report", "labels", ["a", "b"]),
    (REPORT, ["--input", "moved"], "write_report", "tokens", Path("moved")),
    (REPORT, ["--tokenizer", "T"], "write_report", "tokenizer", "T"),
    (REPORT, ["--confidence", "0.9"], "write_report", "confidence", 0.9),
    (REPORT, ["--noise-floor", "0.002"], "write_report", "noise_floor", 0.002),
    (REPORT, ["--margin", "1%"], "write_report", "margin", "1%"),
    (REPORT, ["--max-tokens", "9"], "write_report", "max_tokens", 9),
    (["demo"], ["--out", "elsewhere"], "score_four_ways", "0", Path("elsewhere")),
    (["runs", "export", "r", "-o", "a.csv"], ["-o", "b.csv"], "export_tokens", "1", Path("b.csv")),
    (WORDS, ["--words"], "export_words", "1", Path("w.csv")),
    (WORDS, ["--input", "in.safetensors"], "export_words", "tokens", Path("in.safetensors")),
]
WITH_THEIR_PART = {"igf"}  # groups whose options are tested beside the part that they command
EVERYWHERE = {"--json", "--help", "--version"}  # tested for every command below


def _run_record() -> Run:
    return Run(
        schema_version=SCHEMA_VERSION,
        perplexit_version="0",
        status="complete",
        created="2026-01-01T00:00:00+00:00",
        perplexity=12.5,
        num_tokens=7,
        model={"address": "M[0]"},
        session={"engine": "toy", "dtype": "float32"},
    )


def _token_file() -> SimpleNamespace:
    protocol = {"name": "sliding", "max_length": 8, "stride": 4, "bos": "none"}
    spec = {"protocol": protocol, "corpus": {"skipped": {"empty": {"count": 2, "first": [0, 3]}}}}
    counts = dict.fromkeys(["num_documents", "num_ids", "num_windows", "num_targets"], 1)
    prints = dict.fromkeys(["input_fingerprint", "text_fingerprint", "tokenizer_fingerprint"], "f")
    return SimpleNamespace(
        path=Path("out"), protocol="sliding", vocab_size=9, spec=spec, **counts, **prints
    )


def _program() -> ProgramMetadata:
    return ProgramMetadata(
        engine="onnx",
        perplexity=True,
        dtype="float32",
        opset=20,
        shapes=ProgramShapes(length=8),
        model=ProgramModel("M", "Llama", 1, "f", 9),
        memory=ProgramMemory(1, 1),
        verification=ProgramVerification("the checkpoint", 3, 1e-6),
        files=(ProgramFile("model.onnx", 1024, "f"),),
        quantization=ProgramQuantization("int4", "a library", 2, 512, 4.5),
    )


class _Compared(SimpleNamespace):
    def to_json(self) -> dict[str, Any]:
        return {"verdict": "worse"}

    def gates_as_junit_xml(self) -> str:
        return "<testsuites/>"

    def gates_as_markdown(self) -> str:
        return "| gate |"

    def __str__(self) -> str:
        return "verdict: worse [really]"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Every verb replaced by a recorder: verb → what it was last called with, by name or place."""
    seen: dict[str, dict[str, Any]] = {}

    def recorder(verb: str, result: Any) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            print("a library that prints")
            seen[verb] = {str(i): value for i, value in enumerate(args)} | kwargs
            return result

        return record

    record, program = _run_record(), CompiledProgram(Path("out"), _program())
    for verb, result in {
        "prepare": _token_file(),
        "import_id_lines": _token_file(),
        "export_id_lines": 1,
        "evaluate": record,
        "compare_runs": _Compared(failed=[]),
        "compile": program,
        "explain": SimpleNamespace(to_json=dict),
        "doctor": SimpleNamespace(to_json=dict, status="pass"),
        "ngram_overlap": SimpleNamespace(to_json=dict),
        "find_runs": [record],
        "verify_run": [],
        "export_tokens": None,
        "write_report": SimpleNamespace(headline="it is worse", num_bytes=1, to_json=dict),
        "export_words": None,
        "export_documents": None,
    }.items():
        monkeypatch.setitem(vars(px), verb, recorder(verb, result))
    monkeypatch.setattr(px.Run, "open", lambda folder: record)
    story = "perplexit.cli.demo"
    monkeypatch.setattr(f"{story}.score_four_ways", recorder("score_four_ways", []))
    monkeypatch.setattr(f"{story}.table", lambda scored: "the table")
    monkeypatch.setattr(f"{story}.explanation", lambda scored, out: "the story")
    monkeypatch.setattr(f"{story}.document", lambda scored: {"reference": {}})
    return seen


def _perplexit(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def _commands(prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    command: Any = typer.main.get_command(app)
    for name in prefix:
        command = command.commands[name]
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from _commands((*prefix, name))
        else:
            yield (*prefix, name), child


@pytest.mark.trap(33)
@pytest.mark.parametrize(("command", "option", "verb", "name", "value"), TRANSLATIONS)
def test_trap_33_an_option_reaches_the_library(
    calls: dict[str, dict[str, Any]],
    command: list[str],
    option: list[str],
    verb: str,
    name: str,
    value: Any,
) -> None:
    result = _perplexit(*command, *option)
    assert result.exit_code == 0, result.stderr
    assert calls[verb][name] == value


@pytest.mark.trap(33)
def test_trap_33_no_option_is_without_a_test() -> None:
    tested = {(command[0], option[0]) for command, option, *_ in TRANSLATIONS}
    tested |= {("compare", "--junit"), ("compare", "--markdown")}  # test_gate_reports_are_written
    tested |= {("compare", "--force")}  # tests/trust/test_overwrite.py
    missing = set()
    for path, command in _commands():
        for param in command.params if path[0] not in WITH_THEIR_PART else ():
            names = {*param.opts, *param.secondary_opts}
            if param.param_type_name != "option" or names & EVERYWHERE:
                continue
            if not any((path[0], name) in tested for name in names):
                missing.add((*path, *sorted(names)))
    assert missing == set()


@pytest.mark.parametrize(
    "command",
    [
        PREPARE,
        EVAL,
        COMPARE,
        COMPILE,
        EXPLAIN,
        REPORT,
        ["demo"],
        ["runs", "list"],
        ["runs", "show", "r"],
        ["runs", "verify", "r"],
        ["runs", "export", "r", "-o", "x.csv"],
    ],
    ids=" ".join,
)
def test_json_is_one_document_on_stdout_and_people_read_stderr(
    calls: dict[str, dict[str, Any]], command: list[str]
) -> None:
    without = _perplexit(*command)
    assert without.exit_code == 0, without.stderr
    assert without.stdout == ""
    assert without.stderr != ""
    with_json = _perplexit(*command, "--json")
    json.loads(with_json.stdout)
    assert with_json.stderr == without.stderr or command[0] == "eval"  # which names a new folder


def test_several_candidates_reach_the_library(calls: dict[str, dict[str, Any]]) -> None:
    _perplexit(*COMPARE, "another", "--json")
    assert calls["compare_runs"]["1"] == [Path("candidate"), Path("another")]


def test_gate_reports_are_written(calls: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    files = {"--junit": tmp_path / "ci" / "gates.xml", "--markdown": tmp_path / "gates.md"}
    options = [str(part) for pair in files.items() for part in pair]
    assert _perplexit(*COMPARE, *options).exit_code == 0
    assert files["--junit"].read_text() == "<testsuites/>"
    assert files["--markdown"].read_text() == "| gate |"


def test_brackets_in_names_are_not_taken_for_markup(calls: dict[str, dict[str, Any]]) -> None:
    assert "M[0]" in _perplexit("runs", "show", "r").stderr
    assert "worse [really]" in _perplexit(*COMPARE).stderr


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ModelError("expected a model, got none; name one"), 1),
        (UsageError("expected a, got b; give a"), 2),
        (GateError("expected a ratio below 1.01, got 1.02"), 3),
        (PermissionError(13, "Permission denied", "run.json"), 1),
    ],
)
def test_a_stated_error_is_one_message_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(vars(px), "evaluate", fail)
    result = _perplexit(*EVAL, "--json")
    message = str(error) if exit_code > 1 or isinstance(error, ModelError) else "run.json: "
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(vars(px), "evaluate", fail)
    assert isinstance(_perplexit(*EVAL).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "M"],
        ["evaluate"],
        ["eval", "M", "in", "--no-such-option"],
        ["eval", "M", "in", "--batch-size", "0"],
        ["eval", "M", "in", "--batch-size", "many"],
        ["eval", "M", "in", "--threads", "0"],
        ["eval", "M", "in", "--top-k", "-1"],
        ["eval", "M", "in", "--on-non-finite", "ignore"],
        ["prepare", "a.txt", "-o", "out"],
        ["prepare", "a.txt", "--from-ids", "--stride", "4", "-o", "out"],
        ["prepare", "a.txt", "b.txt", "--from-ids", "-o", "out"],
        ["compile", "M", "-o", "out"],
        ["compare", "only-one"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_without_a_traceback(
    calls: dict[str, dict[str, Any]], words: list[str]
) -> None:
    result = _perplexit(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr
    assert isinstance(result.exception, SystemExit), "a traceback"
    assert calls == {}


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(px), "evaluate", interrupt)
    result = _perplexit("eval", "M", "my input.safetensors", "--run", "r")
    assert result.exit_code == 130
    assert "perplexit eval M 'my input.safetensors' --run r" in result.stderr


def test_eval_without_a_run_names_a_new_folder_each_time(
    calls: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = set()
    for _ in range(3):
        result = _perplexit(*EVAL)
        folder = calls["evaluate"]["run"]
        assert folder.parent == Path("runs")
        assert str(folder) in result.stderr
        folder.mkdir(parents=True)
        folders.add(folder)
    assert len(folders) == 3


def test_an_unsound_run_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(px), "verify_run", lambda run: ["perplexity: recorded 1, is 2"])
    result = _perplexit("runs", "verify", "r", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"] == ["perplexity: recorded 1, is 2"]
    assert "not sound" in result.stderr


def test_help_of_every_command_has_examples() -> None:
    for path, _ in _commands():
        shown = _perplexit(*path, "--help")
        assert shown.exit_code == 0
        assert f"perplexit {' '.join(path)}" in shown.stdout.partition("Examples")[2]


def test_version() -> None:
    assert _perplexit("--version").stdout == f"perplexit {px.__version__}\n"


@pytest.mark.parametrize(
    ("requirement", "file"), [("no-such-package==1.0", "a.txt"), ("numpy==0", "no-such-file.txt")]
)
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    requirement: str, file: str
) -> None:
    with pytest.raises(MissingPackageError, match=f"pip install --no-deps {requirement}"):
        packaged_file(requirement, file)


def test_the_speed_counts_only_what_this_process_scored() -> None:
    update = SimpleNamespace(num_tokens=300, num_tokens_resumed=100, nll_sum=300.0, seconds=2.0)
    assert running_figures(update) == "100 tokens/s  perplexity 2.718"
    start = SimpleNamespace(num_tokens=0, num_tokens_resumed=0, nll_sum=0.0, seconds=0.0)
    assert running_figures(start) == ""
    hopeless = SimpleNamespace(num_tokens=1, num_tokens_resumed=1, nll_sum=1e4, seconds=0.0)
    assert running_figures(hopeless) == ""

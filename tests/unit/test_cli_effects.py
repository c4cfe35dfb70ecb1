"""Trap 33 on the real thing: a command is run with one option changed, and the effect is seen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from perplexit.cli.app import app

ROWS = [
    {"text": "The loss of a token is measured.", "page": "A page.", "field": "a", "ask": "What? "},
    {"text": "A window is what a pass sees.", "page": "Its text.", "field": "b", "ask": "And? "},
]


def _run(*words: str | Path) -> dict[str, Any]:
    """The JSON document of a command that must succeed."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def _complaint(*words: str | Path, exit_code: int = 1) -> str:
    """What a command that must fail says."""
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def prepared(corpus: Path, tiny_llama_dir: Path) -> Callable[..., dict[str, Any]]:
    """`prepare` of the corpus with small windows and whatever options a test adds."""

    def prepare(*options: str | Path) -> dict[str, Any]:
        output = corpus.with_name("input.safetensors")
        base = ["--tokenizer", tiny_llama_dir, "-o", output, "--max-length", "8"]
        return _run("prepare", corpus, *base, *options)

    return prepare


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    "options",
    [
        ("--protocol", "disjoint"),
        ("--max-length", "6"),
        ("--stride", "2"),
        ("--bos", "every"),
        ("--text-key", "page"),
        ("--domain-key", "field"),
        ("--prompt-key", "ask"),
    ],
    ids=" ".join,
)
def test_trap_33_an_option_of_prepare_changes_the_input(
    prepared: Callable[..., dict[str, Any]], options: tuple[str, ...]
) -> None:
    assert prepared(*options)["input_fingerprint"] != prepared()["input_fingerprint"]


@pytest.mark.trap(33)
def test_trap_33_the_tokenizer_is_the_one_that_was_named(
    prepared: Callable[..., dict[str, Any]], byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    other = json.loads(byte_tokenizer_json.read_text())
    other["model"]["merges"] = other["model"]["merges"][:-20]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(other))
    changed = prepared("--tokenizer", path)
    assert changed["tokenizer_fingerprint"] != prepared()["tokenizer_fingerprint"]
    assert changed["text_fingerprint"] == prepared()["text_fingerprint"]


def test_exported_ids_come_back_as_the_same_windows(
    prepared: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    lines, again = tmp_path / "ids.txt", tmp_path / "again.safetensors"
    first = prepared("--protocol", "disjoint", "--export-ids", lines)
    second = _run("prepare", lines, "--from-ids", "-o", again)
    assert second["num_windows"] == len(lines.read_text().splitlines()) == first["num_windows"]
    assert second["num_tokens"] == first["num_tokens"]
    assert second["path"] == str(again)


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["prepare", "missing.txt", "--tokenizer", "{tokenizer}", "-o", "{out}"], 1),
        (["prepare", "{corpus}", "--tokenizer", "{corpus}", "-o", "{out}"], 1),
        (["prepare", "{corpus}", "--tokenizer", "{tokenizer}", "-o", "no/such/folder/x"], 1),
        (
            [
                "prepare",
                "{corpus}",
                "--text-key",
                "no",
                "--tokenizer",
                "{tokenizer}",
                "-o",
                "{out}",
            ],
            1,
        ),
        (
            [
                "prepare",
                "{corpus}",
                "--stride",
                "2000",
                "--tokenizer",
                "{tokenizer}",
                "-o",
                "{out}",
            ],
            2,
        ),
        (
            ["prepare", "{corpus}", "--protocol", "x", "--tokenizer", "{tokenizer}", "-o", "{out}"],
            2,
        ),
        (["prepare", "{corpus}", "--bos", "twice", "--tokenizer", "{tokenizer}", "-o", "{out}"], 2),
        (["eval", "missing/", "{corpus}"], 1),
        (["compare", "missing-a", "missing-b"], 1),
        (["runs", "list", "missing"], 1),
        (["runs", "show", "missing"], 1),
        (["runs", "verify", "missing"], 1),
        (["runs", "export", "missing", "-o", "x.csv"], 1),
    ],
)
def test_what_is_missing_or_wrong_is_one_short_message(
    corpus: Path,
    byte_tokenizer_json: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    exit_code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"corpus": corpus, "tokenizer": byte_tokenizer_json, "out": tmp_path / "out"}
    complaint = _complaint(*(word.format(**names) for word in words), exit_code=exit_code)
    assert complaint.startswith("Error: ")
    assert len(complaint) < 500

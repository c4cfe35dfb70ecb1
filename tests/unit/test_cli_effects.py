"""Trap 33 on the real thing: a command is run with one option changed, and the effect is seen."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
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
    assert isinstance(result.exception, SystemExit), "a traceback"
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
        base = ["--tokenizer", tiny_llama_dir, "-o", output, "--max-length", "8", "--force"]
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


@pytest.fixture(scope="module")
def tokens(corpus: Path, tiny_llama_dir: Path) -> Path:
    """Enough windows for an interval: a text of its own, cut small."""
    text = corpus.with_name("text.txt")
    text.write_text("Whoever measures twice gets the same number. " * 8 + "Why? Because.")
    output = corpus.with_name("text.safetensors")
    _run("prepare", text, "--tokenizer", tiny_llama_dir, "--max-length", "16", "-o", output)
    return output


@pytest.fixture(scope="module")
def evaluated(tiny_llama_dir: Path, tokens: Path) -> Callable[..., dict[str, Any]]:
    """`eval` of the tiny model, each time in a new folder (which `--run` may name)."""
    numbers = itertools.count()

    def evaluate(*options: str | Path, model: str | Path = tiny_llama_dir) -> dict[str, Any]:
        folder = tokens.parent / f"run-{next(numbers)}"
        record = _run("eval", model, tokens, "--run", folder, *options)
        return record | {"folder": folder}

    return evaluate


@pytest.fixture(scope="module")
def plain(evaluated: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return evaluated()


@pytest.fixture(scope="module")
def poisoned_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a NaN in the input row of `?`, which stands near the text's end."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(tiny_llama_dir, folder)
    weights = load_file(folder / "model.safetensors")
    question = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("?")
    weights["model.embed_tokens.weight"][question] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.trap(33)
def test_trap_33_eval_computes_in_the_dtype_that_was_named(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any]
) -> None:
    bf16 = evaluated("--dtype", "bf16")
    assert (plain["session"]["dtype"], bf16["session"]["dtype"]) == ("float32", "bfloat16")
    assert bf16["nll_sum"] != plain["nll_sum"]
    assert bf16["nll_sum"] == pytest.approx(plain["nll_sum"], rel=0.05)


@pytest.mark.trap(33)
def test_trap_33_eval_batches_as_told(evaluated: Callable[..., dict[str, Any]]) -> None:
    assert evaluated("--batch-size", "2")["batch_plan"]["limits"][0]["max_windows"] == 2


@pytest.mark.trap(33)
def test_trap_33_eval_uses_the_threads_it_is_given(
    evaluated: Callable[..., dict[str, Any]],
) -> None:
    assert evaluated("--threads", "1")["threads"] == 1
    assert evaluated("--threads", "2")["threads"] == 2


@pytest.mark.trap(33)
def test_trap_33_eval_keeps_as_many_alternatives_as_asked(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any]
) -> None:
    table = pq.read_table(evaluated("--top-k", "3")["folder"] / "tokens.parquet")
    assert table.schema.field("top_ids").type.list_size == 3
    without = pq.read_table(plain["folder"] / "tokens.parquet")
    assert "top_ids" not in without.column_names


@pytest.mark.trap(33)
def test_trap_33_eval_widens_the_interval_with_the_confidence(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any]
) -> None:
    wider = evaluated("--confidence", "0.99")
    assert wider["perplexity"] == plain["perplexity"]
    assert wider["perplexity_low"] < plain["perplexity_low"]
    assert wider["perplexity_high"] > plain["perplexity_high"]


@pytest.mark.trap(33)
def test_trap_33_eval_stops_at_a_nan_or_counts_it(
    evaluated: Callable[..., dict[str, Any]],
    plain: dict[str, Any],
    poisoned_dir: Path,
    tokens: Path,
    tmp_path: Path,
) -> None:
    complaint = _complaint("eval", poisoned_dir, tokens, "--run", tmp_path / "stopped")
    assert "window" in complaint
    assert "position" in complaint
    counted = evaluated("--on-non-finite", "count", model=poisoned_dir)
    assert 0 < counted["num_non_finite"] < 16
    assert counted["num_tokens"] + counted["num_non_finite"] == plain["num_tokens"]


@pytest.mark.trap(33)
def test_trap_33_eval_uses_the_device_that_was_named(
    tokens: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    missing = "cuda" if sys.platform == "darwin" else "mps"
    base = ("eval", tiny_llama_dir, tokens, "--run", tmp_path)
    assert missing in _complaint(*base, "--device", missing, exit_code=2)


@pytest.mark.trap(33)
def test_trap_33_eval_quantizes_or_says_that_it_cannot(
    evaluated: Callable[..., dict[str, Any]],
    plain: dict[str, Any],
    tokens: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    quantized = evaluated("--quantization", "int4")
    assert quantized["session"]["quantization"]["name"] == "int4"
    assert quantized["nll_sum"] != plain["nll_sum"]
    base = ("eval", tiny_llama_dir, tokens, "--run", tmp_path)
    assert "q4_k_m" in _complaint(*base, "--quantization", "q4_k_m")


@pytest.mark.trap(33)
def test_trap_33_eval_prefills_and_decodes_as_told(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any]
) -> None:
    cached = evaluated("--mode", "cached", "--prompt-len", "5", "--decode-chunk", "3")
    assert cached["nll_sum"] == pytest.approx(plain["nll_sum"], abs=1e-3)
    told = [cached["session"][name] for name in ("mode", "prompt_len", "decode_chunk")]
    assert told == ["cached", 5, 3]
    assert cached["seconds"]["decode"] > 0
    assert plain["session"]["mode"] == "full"
    assert plain["seconds"]["decode"] == 0
    usual = evaluated("--mode", "cached")["session"]
    assert (usual["prompt_len"], usual["decode_chunk"]) == (1, 1)


@pytest.fixture(scope="module")
def adapter_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on the tiny model, of random numbers that change its losses."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.trap(33)
def test_trap_33_eval_puts_the_adapter_on_and_merges_it_as_told(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any], adapter_dir: Path
) -> None:
    beside = evaluated("--adapter", adapter_dir)
    merged = evaluated("--adapter", adapter_dir, "--merge-adapter")
    assert abs(beside["nll_sum"] - plain["nll_sum"]) > 1e-3
    assert merged["nll_sum"] == pytest.approx(beside["nll_sum"], abs=1e-3)
    assert [run["model"]["adapter"]["merged"] for run in (beside, merged)] == [False, True]


@pytest.mark.trap(33)
def test_trap_33_compare_follows_its_options(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any]
) -> None:
    candidate = evaluated("--dtype", "bf16")["folder"]
    usual = _run("compare", plain["folder"], candidate)
    wider = _run("compare", plain["folder"], candidate, "--confidence", "0.99")
    assert wider["ppl_ratio_high"] > usual["ppl_ratio_high"]
    shown = _run("compare", plain["folder"], candidate, "--most-changed", "2")["most_changed"]
    assert len(shown) == 2
    assert len(usual["most_changed"]) == 5


def test_the_same_run_is_not_scored_twice(
    evaluated: Callable[..., dict[str, Any]], plain: dict[str, Any]
) -> None:
    again = evaluated("--run", plain["folder"])
    assert again["created"] == plain["created"]
    assert again["nll_sum"] == plain["nll_sum"]


def test_another_dtype_in_the_same_run_is_refused(
    plain: dict[str, Any], tokens: Path, tiny_llama_dir: Path
) -> None:
    complaint = _complaint(
        "eval", tiny_llama_dir, tokens, "--run", plain["folder"], "--dtype", "bf16"
    )
    assert "dtype" in complaint


def test_runs_are_listed_shown_verified_and_exported(plain: dict[str, Any], tmp_path: Path) -> None:
    listed = _run("runs", "list", plain["folder"].parent)
    assert str(plain["folder"]) in [run["folder"] for run in listed]
    assert _run("runs", "show", plain["folder"])["nll_sum"] == plain["nll_sum"]
    assert _run("runs", "verify", plain["folder"])["sound"] is True
    for suffix in ("csv", "jsonl", "parquet"):
        file = tmp_path / f"tokens.{suffix}"
        _run("runs", "export", plain["folder"], "-o", file)
        assert file.stat().st_size > 0
    assert len((tmp_path / "tokens.jsonl").read_text().splitlines()) == plain["num_tokens"]
    complaint = _complaint(
        "runs", "export", plain["folder"], "-o", tmp_path / "tokens.xls", exit_code=2
    )
    assert ".csv" in complaint


def test_a_run_that_was_tampered_with_is_not_sound(plain: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(plain["folder"], copy)
    record = json.loads((copy / "run.json").read_text())
    record["nll_sum"] *= 0.99
    (copy / "run.json").write_text(json.dumps(record))
    assert "nll_sum" in _complaint("runs", "verify", copy)


@pytest.fixture(scope="module")
def compiled(tiny_llama_dir: Path, tokens: Path) -> Callable[..., dict[str, Any]]:
    """`compile` of the tiny model to ONNX, each time into a new folder."""
    numbers = itertools.count()

    def compile_(*options: str) -> dict[str, Any]:
        folder = tokens.parent / f"program-{next(numbers)}"
        return _run("compile", tiny_llama_dir, "--to", "onnx", "-o", folder, *options)

    return compile_


@pytest.mark.slow
@pytest.mark.trap(33)
def test_trap_33_compile_makes_what_was_asked_for(
    compiled: Callable[..., dict[str, Any]],
    evaluated: Callable[..., dict[str, Any]],
    plain: dict[str, Any],
) -> None:
    usual = compiled()
    assert (usual["perplexity"], usual["quantization"]) == (True, None)
    assert set(usual["shapes"].values()) == {None}
    assert evaluated(model=usual["folder"])["nll_sum"] == pytest.approx(plain["nll_sum"], abs=1e-3)

    fixed = compiled("--max-length", "16", "--batch-size", "2")
    assert (fixed["shapes"]["length"], fixed["shapes"]["batch_size"]) == (16, 2)
    assert evaluated(model=fixed["folder"])["nll_sum"] == pytest.approx(plain["nll_sum"], abs=1e-3)

    small = compiled("--quantization", "int4", "--no-perplexity")
    assert small["perplexity"] is False
    assert small["quantization"]["num_modules"] > 0
    assert abs(evaluated(model=small["folder"])["nll_sum"] - plain["nll_sum"]) > 1e-3


@pytest.mark.parametrize(
    ("options", "exit_code", "named"),
    [
        (["--to", "abacus"], 1, "abacus"),
        (["--device", "cuda"], 1, "cuda"),
        (["--quantization", "int3"], 2, "int3"),
        (["--max-length", "1"], 2, "max_length"),
    ],
)
def test_trap_33_compile_refuses_what_it_cannot_do(
    tiny_llama_dir: Path, tmp_path: Path, options: list[str], exit_code: int, named: str
) -> None:
    base = ("compile", tiny_llama_dir, "--to", "onnx", "-o", tmp_path / "program")
    assert named in _complaint(*base, *options, exit_code=exit_code)
    assert not (tmp_path / "program").exists()

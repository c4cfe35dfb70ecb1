"""F: what is said to people is true, whole, early, and names what to do."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perplexit as px
from perplexit.atomic_files import replaced_folder
from perplexit.cli.output import people
from perplexit.diagnosis.run_differences import plain
from perplexit.errors import CompilationError, PerplexitError
from perplexit.igf.articles import Articles
from tests.toy_sessions import BigramSession


@pytest.fixture
def tokens(byte_tokenizer_json: Path, tmp_path: Path) -> px.TokenFile:
    texts = ["The loss of one token is what one forward pass sees. " * 3] * 4
    output = tmp_path / "in.safetensors"
    return px.prepare(texts, tokenizer=byte_tokenizer_json, max_length=32, output=output)


def command(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from perplexit.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


@pytest.mark.parametrize("option", ["--dtype", "--quantization"])
def test_f_a_bad_name_is_a_usage_error_before_any_engine_is_imported(
    option: str, tokens: px.TokenFile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom perplexit.cli.app import app\n"
        "try:\n app(sys.argv[1:])\nfinally:\n print('torch' in sys.modules)"
    )
    words = ["eval", tiny_llama_dir, tokens.path, option, "nonsense", "--run", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "False\n"


def test_f_sibling_a_precision_of_another_engine_is_named(tiny_llama_dir: Path) -> None:
    with pytest.raises(px.errors.QuantizationError, match="which gguf can make") as caught:
        px.load_session(tiny_llama_dir, quantization="q4_k_m")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (64, None, "64 and not set"),
        (5.743702174853233, 4.0, "5.744 and 4"),
        (True, False, "True and False"),
    ],
)
def test_f_values_are_shown_as_people_write_them(first: Any, second: Any, said: str) -> None:
    assert plain("the strides differ", "stride", first, second).sentence.endswith(said)


def nothing_may_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the error was stated")

    monkeypatch.setattr("perplexit.sessions.registry.load_session", fail)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "bf16"}, "dtype: recorded float32, now bfloat16"),
        ({"quantization": "8bit"}, "quantization: recorded not set, now int8"),
        ({"quantization": "int8:head"}, "quantization: recorded not set, now int8:head"),
        ({"top_k": 2}, "top_k: recorded 0, now 2"),
        ({"mode": "cached"}, "mode: recorded full, now cached"),
        ({"mode": "cached", "prompt_len": 3}, "prompt_len: recorded not set, now 3"),
        ({"confidence": 0.9}, "confidence: recorded 0.95, now 0.9"),
        ({"on_non_finite": "count"}, "on_non_finite: recorded error, now count"),
        ({"batch_size": 7}, "batch_size: recorded auto, now 7"),
        ({"save_reference": True}, "save_reference: recorded no, now yes"),
    ],
)
def test_f_another_setting_for_a_run_is_refused_before_a_model_is_loaded(
    change: dict[str, Any],
    named: str,
    tokens: px.TokenFile,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    px.evaluate(tiny_llama_dir, tokens, run=tmp_path / "run", threads=1)
    nothing_may_be_loaded(monkeypatch)
    with pytest.raises(px.errors.ResumeError) as caught:
        px.evaluate(tiny_llama_dir, tokens, run=tmp_path / "run", threads=1, **change)
    assert named in str(caught.value)
    assert "{" not in str(caught.value)


def test_f_sibling_the_same_settings_in_other_words_go_on(
    tokens: px.TokenFile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    options = {"run": tmp_path / "run", "threads": 1, "mode": "cached"}
    first = px.evaluate(tiny_llama_dir, tokens, quantization="8bit", dtype="fp32", **options)
    again = px.evaluate(tiny_llama_dir, tokens, quantization="int8", prompt_len=1, **options)
    assert again.nll_sum == first.nll_sum


def test_f_sibling_an_open_session_goes_on_with_its_own_dtype(
    tokens: px.TokenFile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    session = px.load_session(tiny_llama_dir, dtype="bf16", threads=1)
    first = px.evaluate(session, tokens, run=tmp_path / "run")
    assert px.evaluate(session, tokens, run=tmp_path / "run").nll_sum == first.nll_sum
    session.close()


def test_f_sibling_a_wrong_reference_is_refused_before_a_model_is_loaded(
    tokens: px.TokenFile,
    tiny_llama_dir: Path,
    byte_tokenizer_json: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    px.evaluate(BigramSession(), tokens, run=tmp_path / "plain")
    other = px.prepare(["Another text."] * 3, tokenizer=byte_tokenizer_json, max_length=32)
    px.evaluate(BigramSession(), other, run=tmp_path / "other", top_k=2)
    nothing_may_be_loaded(monkeypatch)
    for options, kind, said in (
        ({"reference": tmp_path / "plain"}, px.errors.RunError, "--save-reference"),
        ({"reference": tmp_path / "other"}, px.errors.FingerprintMismatchError, "another"),
        ({"reference": tmp_path / "nowhere"}, px.errors.ModelError, "no path here"),
        ({"reference": "x", "save_reference": True}, px.errors.UsageError, "evaluate twice"),
        ({"reference_dtype": "int3"}, px.errors.UsageError, "float16"),
    ):
        with pytest.raises(kind, match=said):
            px.evaluate(tiny_llama_dir, tokens, **options)


@pytest.mark.parametrize("content", ["The committee met on Tuesday.\n" * 9, "short text", ""])
def test_f_a_text_in_place_of_a_token_file_is_scored(
    content: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    path = tmp_path / "my.txt"
    path.write_text(content)
    done = command("eval", tiny_llama_dir, path, "--run", tmp_path / "run")
    if content:
        assert done.returncode == 0, done.stderr
        assert px.Run.open(tmp_path / "run").num_bytes <= len(content)
    else:
        assert done.returncode != 0
        assert "empty" in done.stderr
        assert "Traceback" not in done.stderr
        assert not re.search(r"\d{12}", done.stderr.replace(str(path), ""))


def test_f_igf_names_the_option_for_short_articles() -> None:
    articles = Articles.of([np.arange(20)])
    with pytest.raises(PerplexitError, match="--min-length"):
        articles.longer_than(1026)


@pytest.mark.parametrize(("dtype", "advice"), [("float32", False), ("bfloat16", True)])
def test_f_float32_is_not_advised_to_someone_who_scores_in_it(
    dtype: str, advice: bool, tokens: px.TokenFile
) -> None:
    session = BigramSession()
    object.__setattr__(session.description, "dtype", dtype)

    def broken(windows: Any) -> Any:
        return [np.full(len(window.targets_N), np.nan, np.float32) for window in windows]

    session.token_nll = broken
    with pytest.raises(px.errors.NonFiniteError) as caught:
        px.evaluate(session, tokens)
    assert ("Score in float32" in str(caught.value)) == advice
    assert "--on-non-finite count" in str(caught.value)


def test_f_temporary_names_are_not_shown(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise CompilationError(f"expected a program in {folder / 'model.onnx'}, got none")

    with pytest.raises(CompilationError) as caught, replaced_folder(tmp_path / "out") as staging:
        fail(staging)
    assert str(caught.value) == f"expected a program in {tmp_path / 'out' / 'model.onnx'}, got none"


def test_f_llama_cpp_s_reason_is_told(tmp_path: Path) -> None:
    gguf_file = pytest.importorskip("perplexit.compilation.gguf_file")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CompilationError) as caught:
        gguf_file.llamacpp_nll(path, np.arange(8, dtype=np.int32))
    assert re.search(r"gguf_init|version|magic|key-value", str(caught.value)), caught.value


def test_f_a_program_of_the_last_position_is_not_sent_in_a_circle() -> None:
    onnx = pytest.importorskip("perplexit.sessions.onnx.session")
    assert "--mode" not in onnx.OnnxLogitsSession._last_position_alone
    assert "--mode cached" in onnx.OnnxCachingSession._last_position_alone


def test_f_nothing_is_broken_or_padded_where_stderr_is_no_terminal(
    tokens: px.TokenFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a very long name of a folder " * 8
    folder = tmp_path / name.strip()
    run = px.evaluate(BigramSession(), tokens, run=folder)
    done = command("runs", "list", tmp_path)
    assert done.returncode == 0
    assert str(folder) in done.stderr
    assert not re.search(r" $", done.stderr, re.MULTILINE)
    assert str(folder) in command("runs", "show", folder).stderr or run.model["address"]
    people().print("x" * 500)
    assert "x" * 500 in capsys.readouterr().err


def test_f_sibling_a_terminal_s_lines_are_broken_between_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io  # noqa: PLC0415

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    people().print("word " * 30)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 1
    assert all(set(line.split()) <= {"word"} for line in lines)


def test_f_libraries_say_nothing_when_they_are_imported_through_perplexit() -> None:
    code = (
        "import perplexit, importlib\n"
        "for name in ('quantization.torchao_weights', 'quantization.bitsandbytes_weights'):\n"
        "    importlib.import_module('perplexit.' + name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""

"""E3 and E4: whose code is run, when, and what is said of it."""

import ast
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import perplexit as px
import perplexit.igf as igf
from perplexit.cli.app import app
from perplexit.errors import PerplexitError, TrustWarning, UsageError
from perplexit.igf.tensors_with_record import PICKLE_SUFFIXES, StoredFileError
from perplexit.program_record import (
    ProgramFile,
    ProgramMemory,
    ProgramMetadata,
    ProgramModel,
    ProgramShapes,
    ProgramVerification,
)
from tests.tiny_models import save_tiny_model

SOURCES = Path(px.__file__).parent
PERPLEXIT = Path(sys.executable).with_name("perplexit")


class Touches:
    """A pickle of this makes the file `path` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def _evil(path: Path, trace: Path) -> Path:
    rows = [np.arange(40).reshape(1, -1), np.arange(50).reshape(1, -1)]
    joblib.dump({"rows": rows, "code": Touches(trace)}, path)
    return path


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_e3_no_pickle_is_read_unless_it_is_allowed_by_name(tmp_path: Path, suffix: str) -> None:
    path, trace = tmp_path / f"stories{suffix}", tmp_path / "trace"
    _evil(path, trace)
    for read in (lambda: igf.load_pairs(path), lambda: igf.generate_datasets(8, path)):
        with pytest.raises(UsageError, match=r"full rights.*--allow-pickle"):
            read()
    assert not trace.exists()


def test_e3_an_allowed_pickle_is_said_to_run_with_full_rights_before_it_does(
    tmp_path: Path,
) -> None:
    """There is no sandbox that anyone might rely on: the code in the file really runs."""
    path, trace = _evil(tmp_path / "stories.jbl", tmp_path / "trace"), tmp_path / "trace"
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrustWarning)
        with pytest.raises(TrustWarning, match="run with your full rights"):
            igf.load_pairs(path, allow_pickle=True)
    assert not trace.exists()  # said first
    with pytest.warns(TrustWarning), pytest.raises(PerplexitError):  # it holds no pairs
        igf.load_pairs(path, allow_pickle=True)
    assert trace.exists()


def test_e3_the_restricted_unpickler_is_gone() -> None:
    assert not [path for path in SOURCES.rglob("*.py") if "Unpickler" in path.read_text()]
    assert not (SOURCES / "igf" / "restricted_pickle.py").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"\x80\x05", pickle.dumps(3), pickle.dumps({"a": [1]})]
)
def test_e3_sibling_a_damaged_or_other_pickle_is_a_stated_error(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "stories.jbl"
    path.write_bytes(content)
    with pytest.warns(TrustWarning), pytest.raises(StoredFileError):
        igf.load_pairs(path, allow_pickle=True)
    with pytest.warns(TrustWarning), pytest.raises(PerplexitError):
        igf.generate_datasets(8, path, allow_pickle=True)


def test_e3_the_command_line_says_so_in_one_line_and_in_its_help(tmp_path: Path) -> None:
    path, call = _evil(tmp_path / "pairs.jbl", tmp_path / "trace"), CliRunner().invoke
    command = ["igf", "train", str(path), "-o", str(tmp_path / "learner.safetensors")]
    refused, allowed = call(app, command), call(app, [*command, "--allow-pickle"])
    assert refused.exit_code == 2
    assert "full rights" in refused.stderr
    assert allowed.exit_code == 1
    warning, error = allowed.stderr.splitlines()
    assert warning.startswith("Warning: ")
    assert "full rights" in warning
    assert error.startswith("Error: ")
    told = call(app, ["igf", "train", "--help"]).stdout
    assert "full rights" in re.sub(r"[\s│]+", " ", told)


# --- other pickles, and other people's code ------------------------------------------------------


def test_e3_sibling_nothing_else_reads_a_pickle() -> None:
    """`torch.load`, `numpy.load` and `pickle` stand nowhere; joblib in one module."""
    readers = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    found: set[tuple[str, str]] = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {(path.name, n.name) for n in node.names if n.name in readers}
            if isinstance(node, ast.ImportFrom) and node.module in readers:
                found.add((path.name, node.module))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if name in ("torch.load", "np.load", "numpy.load"):
                    found.add((path.name, name))
    assert found == {("pickles.py", "joblib")}


def test_e4_sibling_code_that_comes_with_a_model_is_off_wherever_one_is_loaded() -> None:
    """Every `from_pretrained` of an Auto class says so, or reads a GGUF file, which has no code."""
    without = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name = ast.unparse(node.func)
            if node.func.attr != "from_pretrained" or "Auto" not in name:
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            off = "trust_remote_code" in given and ast.unparse(given["trust_remote_code"])
            if off != "False" and path.name != "gguf_dequantized.py":
                without.append((path.name, node.lineno))
    assert not without


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_e4_sibling_code_in_a_checkpoints_folder_is_not_run(tmp_path: Path, place: str) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    trace = tmp_path / "trace"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    record = json.loads((folder / place).read_text()) if (folder / place).exists() else {}
    record["auto_map"] = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    if place == "config.json":
        record["model_type"] = "evil"
    (folder / place).write_text(json.dumps(record))
    text = tmp_path / "text.txt"
    text.write_text("measured twice " * 30)
    try:
        px.prepare(text, tokenizer=folder, output=tmp_path / "t.safetensors", max_length=32)
        px.load_session(f"hf:{folder}").close()
    except PerplexitError:
        pass
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_e3_sibling_pickled_weights_are_never_read(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    folder = save_tiny_model("llama", tmp_path / "model")
    if name == "adapter_model.bin":
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        torch.save(Touches(trace), adapter / name)
        with pytest.raises(PerplexitError, match="pickled weights are"):
            px.load_session(f"hf:{folder}", adapter=adapter)
    else:
        (folder / "model.safetensors").unlink()
        torch.save(Touches(trace), folder / name)
        with pytest.raises(PerplexitError):
            px.load_session(f"hf:{folder}")
    assert not trace.exists()


def test_e2_sibling_an_adapter_that_names_others_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "XLORA", "adapters": {"0": "some-org/some-adapter"}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(PerplexitError, match="XLORA"):
        px.load_session(f"hf:{folder}", adapter=adapter)


# --- native programs -----------------------------------------------------------------------------


def _program(folder: Path, engine: str, code: Path) -> str:
    """The address of a program whose native code is the file `code`."""
    folder.mkdir()
    name = {"tvm": "model.so", "pt2": "model.pt2"}[engine]
    (folder / name).write_bytes(code.read_bytes())
    data = (folder / name).read_bytes()
    ProgramMetadata(
        engine=engine,
        perplexity=True,
        dtype="float32",
        opset=0,
        shapes=ProgramShapes(1, 64, 63),
        model=ProgramModel("hf:m", "LlamaForCausalLM", 1, "0" * 64, 320, 256),
        memory=ProgramMemory(1, 1),
        verification=ProgramVerification("the checkpoint", 1, 0.0),
        files=(ProgramFile(name, len(data), hashlib.sha256(data).hexdigest()),),
        made_by={"target": "llvm"},
    ).write(folder)
    return f"{engine}:{folder}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A shared object, and the file that it makes when it is loaded, before anyone calls it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: apt install g++")
    folder = tmp_path_factory.mktemp("native")
    trace = folder / "trace"
    (folder / "evil.cpp").write_text(
        "#include <cstdio>\n"
        f'__attribute__((constructor)) void run() {{ fclose(fopen("{trace}", "w")); }}\n'
    )
    command = [compiler, "-shared", "-fPIC", folder / "evil.cpp", "-o", folder / "evil.so"]
    subprocess.run(command, check=True, timeout=120)
    return folder / "evil.so", trace


@pytest.mark.parametrize("engine", ["tvm", "pt2"])
def test_e4_a_native_program_is_said_to_be_one_before_its_code_is_loaded(
    engine: str, tmp_path: Path, library: tuple[Path, Path]
) -> None:
    """The checksums of its record are right: they find damage, not malice."""
    pytest.importorskip("tvm" if engine == "tvm" else "torch")
    code, trace = library
    trace.unlink(missing_ok=True)
    address = _program(tmp_path / "program", engine, code)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrustWarning)
        with pytest.raises(TrustWarning, match="native program: its code is run with your full"):
            px.load_session(address)
    assert not trace.exists()  # said first
    with pytest.warns(TrustWarning) as told, pytest.raises(PerplexitError, match="failed to load"):
        px.load_session(address)
    assert len([w for w in told if w.category is TrustWarning]) == 1
    if engine == "tvm":
        assert trace.exists()  # it is true: the code ran


@pytest.mark.slow
def test_e4_the_command_line_says_so_in_one_line_and_records_it(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder = save_tiny_model("llama", tmp_path / "model")
    px.compile(f"hf:{folder}", to="tvm", output=tmp_path / "program", max_length=32)
    text = tmp_path / "text.txt"
    text.write_text("measured twice " * 30)
    px.prepare(text, tokenizer=folder, output=tmp_path / "t.safetensors", max_length=32)
    command = [PERPLEXIT, "eval", tmp_path / "program", tmp_path / "t.safetensors", "--run"]
    done = subprocess.run(
        [*command, tmp_path / "run"], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stderr.count("native program") == 1
    assert "TrustWarning" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["session"]["settings"][
        "native_code"
    ]


@pytest.mark.parametrize(("command", "native"), [("onnx", False), ("tvm", True), ("pt2", True)])
def test_e4_sibling_programs_that_are_graphs_are_not_said_to_be_native(
    command: str, native: bool
) -> None:
    from perplexit.sessions.registry import _session_class  # noqa: PLC0415 - engines on demand

    pytest.importorskip({"onnx": "onnxruntime", "tvm": "tvm", "pt2": "torch"}[command])
    assert getattr(_session_class(command), "_native", False) is native


def test_e4_the_docs_say_which_programs_are_native() -> None:
    docs = SOURCES.parents[1] / "docs"
    for page in ("engines-tvm.md", "engines-pt2.md"):
        assert "full rights" in " ".join((docs / page).read_text().split())

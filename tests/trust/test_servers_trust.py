"""E3 and E4: whose code is run, when, and what is said of it."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import perplexit as px
import perplexit.igf as igf
from perplexit.errors import PerplexitError, TrustWarning, UsageError
from perplexit.igf.stored import PICKLE_SUFFIXES, StoredFileError
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
    path = _evil(tmp_path / "pairs.jbl", tmp_path / "trace")
    command = [PERPLEXIT, "igf", "train", path, "-o", tmp_path / "l"]
    refused, allowed, told = (
        subprocess.run([*map(str, c)], capture_output=True, text=True, check=False, timeout=120)
        for c in (command, [*command, "--allow-pickle"], [PERPLEXIT, "igf", "train", "--help"])
    )
    assert refused.returncode == 2
    assert "full rights" in " ".join(refused.stderr.split())
    assert allowed.stderr.startswith("Warning: ")
    assert "full rights" in allowed.stderr.splitlines()[0]
    assert "Traceback" not in allowed.stderr
    assert "full rights" in re.sub(r"[\s│]+", " ", told.stdout)


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
            if off != "False" and path.name != "gguf.py":
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


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tvm", "pt2"])
def test_e4_a_native_program_is_said_to_be_one_where_it_is_opened(
    engine: str, tmp_path: Path
) -> None:
    """Before its code is loaded, once, in words, and on record."""
    pytest.importorskip("tvm" if engine == "tvm" else "torch")
    folder = save_tiny_model("llama", tmp_path / "model")
    program = px.compile(f"hf:{folder}", to=engine, output=tmp_path / "program", max_length=32)
    address = f"{engine}:{program.folder}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrustWarning)
        with pytest.raises(TrustWarning, match="native program: its code is run with your full"):
            px.load_session(address)
    with pytest.warns(TrustWarning, match="native program"):
        session = px.load_session(address)
    assert session.description.settings["native_code"] is True
    session.close()
    done = subprocess.run(
        [PERPLEXIT, "doctor", address],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr.count("native program") == 1
    assert "TrustWarning" not in done.stderr


def test_e4_the_docs_say_which_programs_are_native() -> None:
    docs = SOURCES.parents[1] / "docs"
    for page in ("engines-tvm.md", "engines-pt2.md"):
        assert "full rights" in " ".join((docs / page).read_text().split())

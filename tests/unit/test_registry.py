"""sessions/registry.py: addresses, what a bare path is, and what is said where nothing opens."""

import json
import subprocess
import sys

import pytest

from perplexit.errors import CapabilityError, MissingPackageError, ModelError
from perplexit.sessions import registry
from perplexit.sessions.registry import load_session, split_address


def test_a_checkpoint_folder_opens_in_pytorch_with_and_without_prefix(tiny_llama_dir):
    for address in (str(tiny_llama_dir), tiny_llama_dir, f"hf:{tiny_llama_dir}"):
        session = load_session(address, dtype="bf16", threads=1)
        assert session.description.engine == "pytorch"
        assert session.description.dtype == "bfloat16"
        assert session.model.address == f"hf:{tiny_llama_dir}"
        session.close()


def test_a_program_folder_is_known_by_its_record(tmp_path, tiny_llama_dir):
    (tmp_path / "program.json").write_text(json.dumps({"engine": "onnx"}))
    (tmp_path / "config.json").write_text("{}")  # beside a program, a configuration is its own
    assert split_address(tmp_path) == ("onnx", str(tmp_path))
    assert split_address(tiny_llama_dir) == ("hf", str(tiny_llama_dir))


def test_a_bare_gguf_is_llama_cpps(tmp_path):
    path = tmp_path / "model.GGUF"
    path.write_bytes(b"GGUF")
    assert split_address(path) == ("gguf", str(path))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("someone/model", "write hf:someone/model"),
        ("someone/model@abc123", "write hf:someone/model@abc123"),
        ("nonsense:model", "Addresses: hf:"),
        ("/no/such/folder", "no path here"),
        ("hf:", "without a location"),
        ("{tmp}", "has neither"),
        ("{tmp}/weights.safetensors", "name its folder"),
    ],
)
def test_an_address_that_is_nothing_known_says_what_is(tmp_path, address, message):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        load_session(address.format(tmp=tmp_path))


@pytest.mark.parametrize("content", ["{}", "not json", '["onnx"]', '{"engine": "abacus"}'])
def test_a_damaged_program_record_is_an_error(tmp_path, content):
    (tmp_path / "program.json").write_text(content)
    with pytest.raises(ModelError, match="program"):
        load_session(tmp_path)


def test_an_engine_that_this_version_lacks_is_named_with_those_it_has(monkeypatch):
    engine = registry._Engine("perplexit.sessions.abacus:Abacus", "abacus", "abacus:BEADS")
    monkeypatch.setitem(registry._ENGINES, "abacus", engine)
    with pytest.raises(CapabilityError, match=r"'abacus' is not in this version.*it has hf, onnx"):
        load_session("abacus:beads")


def test_a_missing_package_is_answered_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in [name for name in sys.modules if name.startswith("perplexit.sessions.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingPackageError, match=r"pip install 'perplexit\[onnx\]'"):
        load_session("onnx:anywhere")


@pytest.mark.trap(33)
def test_an_option_that_an_engine_does_not_know_is_refused_not_ignored(monkeypatch):
    """Trap 33: an option is never dropped silently."""

    class Abacus:
        def __init__(self, location, *, threads=None):
            self.location, self.threads = location, threads

    monkeypatch.setattr(registry, "_session_class", lambda prefix: Abacus)
    session = load_session("hf:beads", threads=3)
    assert (session.location, session.threads) == ("beads", 3)
    with pytest.raises(CapabilityError, match="no option dtype"):
        load_session("hf:beads", dtype="float32")


def test_the_registry_imports_no_engine():
    code = (
        "import sys, perplexit.sessions.registry; "
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

"""Files cut short, empty, of something else or of another program: one clear error each."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perplexit.cli.app import app
from perplexit.errors import ModelError
from perplexit.program_record import PROGRAM_FILE
from perplexit.sessions.registry import load_session


@pytest.fixture(scope="module")
def programs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama as a checkpoint, an ONNX program and a GGUF program."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("llama_cpp")
    from perplexit.compilation.targets import compile  # noqa: PLC0415 - imports torch

    root = tmp_path_factory.mktemp("sound")
    made = {to: compile(tiny_llama_dir, to=to, output=root / to).folder for to in ("onnx", "gguf")}
    return made | {"hf": tiny_llama_dir}


def cut_short(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def one_bit(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-100] ^= 0x40
        (folder / name).write_bytes(bytes(content))

    return damage


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / PROGRAM_FILE).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return damage


DAMAGES = {
    "weights cut short": ("hf", cut_short("model.safetensors"), "cannot be read"),
    "no weights": ("hf", without("model.safetensors"), "found neither"),
    "a configuration that is no JSON": ("hf", holding("config.json", b"{"), "expected JSON"),
    "a program's weights cut short": ("onnx", cut_short("model.onnx.data"), "not the file that"),
    "a program without its weights": ("onnx", without("model.onnx.data"), "is missing"),
    "a program without its record": ("onnx", without(PROGRAM_FILE), "without its program.json"),
    "a graph that is none": ("onnx", holding("model.onnx", b"garbage"), "cannot be read as one"),
    "an empty graph": ("onnx", holding("model.onnx", b""), "without any operator"),
    "another GGUF file under the record": ("gguf", one_bit("model.gguf"), "not the file that"),
    "a record that is none": ("gguf", holding(PROGRAM_FILE, b'{"engine": "gguf"}'), "version"),
}


@pytest.mark.parametrize(("kind", "damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_one_clear_error(programs, tmp_path, kind, damage, said) -> None:
    folder = shutil.copytree(programs[kind], tmp_path / "model")
    load_session(folder, threads=1).close()  # sound so far
    damage(folder)
    with pytest.raises(ModelError, match=said):
        load_session(f"{kind}:{folder}", threads=1)


@pytest.mark.parametrize("name", ["model.gguf", "model.arpa"])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_file_that_is_no_model_is_one_clear_error(tmp_path, name, content) -> None:
    pytest.importorskip("kenlm")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="expected a"):
        load_session(tmp_path / name)


@pytest.mark.parametrize("engine", ["onnx", "openvino", "tvm", "pt2"])
def test_a_folder_without_a_program_says_how_to_make_one(tmp_path, engine) -> None:
    with pytest.raises(ModelError, match=f"perplexit compile MODEL --to {engine} -o"):
        load_session(f"{engine}:{tmp_path}")


def test_llamacpps_address_of_a_file_is_not_a_checkpoint(programs) -> None:
    from perplexit.checkpoints.location import find_checkpoint  # noqa: PLC0415 - imports torch

    file = programs["gguf"] / "model.gguf"
    with pytest.raises(ModelError, match=f"write hf:{file}"):
        find_checkpoint(f"gguf:{file}")


def test_the_command_says_it_in_one_message_without_a_traceback(programs, tmp_path) -> None:
    folder = shutil.copytree(programs["onnx"], tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough to be scored. " * 3)
    run = CliRunner()
    prepared = ["prepare", str(text), "--tokenizer", str(programs["hf"]), "-o", str(tmp_path / "t")]
    assert run.invoke(app, prepared).exit_code == 0
    (folder / "model.onnx").write_bytes(b"garbage")
    result = run.invoke(app, ["eval", str(folder), str(tmp_path / "t")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stdout == ""

"""The record of a compiled program: round trip, refusals, damaged files."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perplexit.errors import ModelError
from perplexit.program_record import (
    PROGRAM_FILE,
    ProgramMemory,
    ProgramMetadata,
    ProgramModel,
    ProgramQuantization,
    ProgramShapes,
    ProgramVerification,
    files_of,
)

METADATA = ProgramMetadata(
    engine="onnx",
    perplexity=True,
    dtype="float32",
    opset=20,
    shapes=ProgramShapes(),
    model=ProgramModel("hf:tiny", "LlamaForCausalLM", 1234, "f" * 64, 320, 256),
    memory=ProgramMemory(1000, 12),
    verification=ProgramVerification("the checkpoint", 100, 1e-6),
    files=(),
    head_rows=80,
    made_by={"torch": "2"},
)
QUANTIZATION = ProgramQuantization(
    "int4", "library 1", 14, 5000, 4.5, ("lm_head.weight",), {"bits": 4}
)


@pytest.fixture
def program(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    replace(METADATA, files=files_of(tmp_path)).write(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / PROGRAM_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


sizes = st.none() | st.integers(1, 1 << 40)


@given(
    shapes=st.builds(ProgramShapes, sizes, sizes, sizes),
    quantization=st.sampled_from([None, QUANTIZATION]),
    perplexity=st.booleans(),
)
def test_a_record_survives_json(shapes, quantization, perplexity):
    metadata = replace(METADATA, shapes=shapes, quantization=quantization, perplexity=perplexity)
    assert ProgramMetadata.from_json(json.loads(json.dumps(metadata.to_json()))) == metadata


def test_a_record_survives_its_folder(program):
    metadata = ProgramMetadata.read(program)
    assert [file.name for file in metadata.files] == ["model.onnx", "model.onnx.data"]
    metadata.check_files(program)


def test_a_folder_without_a_record_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ModelError, match="perplexit compile MODEL --to ENGINE"):
        ProgramMetadata.read(tmp_path)


def test_another_format_version_is_refused(program):
    edit(program, format_version=99)
    with pytest.raises(ModelError, match=r"format version 1, got 99"):
        ProgramMetadata.read(program)


def test_the_columns_that_earlier_versions_wrote_are_read(program):
    edit(program, head_columns=1024)
    assert ProgramMetadata.read(program).head_columns == 1024


@pytest.mark.parametrize("changes", [{"shapes": 3}, {"surprise": 1}, {"model": {"address": "x"}}])
def test_a_record_of_another_form_is_refused(program, changes):
    edit(program, **changes)
    with pytest.raises(ModelError, match="compile the checkpoint again"):
        ProgramMetadata.read(program)


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1}'])
def test_a_truncated_record_is_refused(program, text):
    (program / PROGRAM_FILE).write_text(text)
    with pytest.raises(ModelError):
        ProgramMetadata.read(program)


def test_one_changed_byte_in_the_weights_is_refused(program):
    (program / "model.onnx.data").write_bytes(b"weightz")
    with pytest.raises(ModelError, match=r"model\.onnx\.data is not the file that was compiled"):
        ProgramMetadata.read(program).check_files(program)


def test_a_missing_file_is_refused(program):
    (program / "model.onnx").unlink()
    with pytest.raises(ModelError, match="missing"):
        ProgramMetadata.read(program).check_files(program)

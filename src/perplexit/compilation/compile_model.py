"""The verb `compile`: a checkpoint → a folder with a program of another engine."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from perplexit.compilation.targets import load_builder, request_for
from perplexit.errors import ModelError
from perplexit.option_ranges import check_numbers
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata
from perplexit.protected_outputs import Kind, OutputFolder, paths_among


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """A finished program: its folder and its record."""

    folder: Path
    metadata: ProgramMetadata

    def to_json(self) -> dict[str, Any]:
        """Return the program's record with its folder."""
        return {"folder": str(self.folder), **self.metadata.to_json()}


def compile(
    model: str | Path,
    *,
    to: str,
    output: str | Path,
    quantization: str | None = None,
    perplexity: bool = True,
    dtype: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    force: bool = False,
) -> CompiledProgram:
    """Compile `model` (a checkpoint's address) into a program for the engine `to`.

    quantization: a precision that the engine has (`int8`, `int4`, `q4_k_m` …); None: the
        checkpoint's own numbers, in `dtype`.
    perplexity:   True: the program takes ids and targets and gives losses; False: it gives logits.
    max_length, batch_size: sizes to fix in the program; None: any.
    device:       that the program is to run on, as the engine names it; None: its first.
    force:        whether another program in `output` is replaced; one of the same checkpoint and
        settings is made again without it.
    The program is checked against the checkpoint before it is put in place; `output` is either
    whole or as it was. Raises OutputError where `output` holds something else, CompilationError,
    QuantizationError, ModelError, UsageError, and CapabilityError for what no engine here can do.
    """
    check_numbers(max_length=max_length, batch_size=batch_size)
    sizes = batch_size, max_length
    request = request_for(
        to,
        quantization=quantization,
        perplexity=perplexity,
        dtype=dtype,
        sizes=sizes,
        device=device,
    )
    asked = json.loads(json.dumps({"to": to, **asdict(request)}))
    checkpoint = str(model).removeprefix("hf:")
    target = OutputFolder(Path(output), PROGRAM, paths_among(checkpoint), force)
    load_checkpoint, build_program = load_builder(to)
    if target.exists:
        find_checkpoint = import_module("perplexit.checkpoints.location").find_checkpoint
        fingerprint = find_checkpoint(model).fingerprint
        target.check_replaceable(_is_same(target.path, asked, fingerprint))
    with target.staged() as temporary:
        metadata = replace(build_program(load_checkpoint(model), temporary, request), request=asked)
        metadata.write(temporary)
    return CompiledProgram(target.path, metadata)


def _is_program(folder: Path) -> bool:
    """Return whether a folder holds a compiled program and nothing that somebody put beside it."""
    try:
        own = {file.name for file in ProgramMetadata.read(folder).files}
    except ModelError:
        return False
    return all(entry.name in own | {PROGRAM_FILE} for entry in folder.iterdir())


PROGRAM = Kind("a compiled program", _is_program)


def _is_same(folder: Path, asked: Mapping[str, Any], fingerprint: str) -> bool:
    """Return whether the program there was made from the same checkpoint with the same settings."""
    found = ProgramMetadata.read(folder)
    return found.model.weights_fingerprint == fingerprint and found.request == asked

"""The verb `compile`: a checkpoint → a folder with a program of another engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexit.compilation.targets import load_builder, request_for
from perplexit.errors import UsageError
from perplexit.files import replaced_folder
from perplexit.programs import PROGRAM_FILE, ProgramMetadata


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """A finished program: its folder, and what it says of itself."""

    folder: Path
    metadata: ProgramMetadata

    def to_json(self) -> dict[str, Any]:
        """The program's record with its folder."""
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
) -> CompiledProgram:
    """The program that `model` (a checkpoint's address) becomes for the engine `to`.

    quantization: a precision that the engine has (`int8`, `int4`, `q4_k_m` …); None: the
        checkpoint's own numbers, in `dtype`.
    perplexity:   True: the program takes ids and targets and gives losses; False: it gives logits.
    max_length, batch_size: sizes to fix in the program; None: any.
    device:       that the program is to run on, as the engine names it; None: its first.
    The program is checked against the checkpoint before it is put in place; `output` is either
    whole or as it was. Raises CompilationError, QuantizationError, ModelError, UsageError, and
    CapabilityError for what no engine of this version can do.
    """
    request = request_for(
        to,
        quantization=quantization,
        perplexity=perplexity,
        dtype=dtype,
        max_length=max_length,
        batch_size=batch_size,
        device=device,
    )
    folder = Path(output)
    _check_replaceable(folder)
    load_checkpoint, build_program = load_builder(to)
    with replaced_folder(folder) as temporary:
        metadata = build_program(load_checkpoint(model), temporary, request)
        metadata.write(temporary)
    return CompiledProgram(folder, metadata)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder / PROGRAM_FILE).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(
            f"expected a new folder or one with a compiled program, got {folder}, which holds "
            "something else; name another output"
        )

"""The verb `compile`: a checkpoint → a folder with a program of another engine."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexit.compilation.gguf_request import gguf_precision
from perplexit.errors import CapabilityError, MissingPackageError, UsageError
from perplexit.programs import PROGRAM_FILE, ProgramMetadata, ProgramShapes
from perplexit.quantization.precisions import canonical_dtype, recipe_for

_TARGETS = ("onnx", "gguf")


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
    device: str = "cpu",
) -> CompiledProgram:
    """The program that `model` (a checkpoint's address) becomes for the engine `to`.

    quantization: weights in blocks of integers, `int8` or `int4` for ONNX, `q4_k_m` and its like
        for GGUF; None: as the checkpoint has them.
    perplexity:   True: the program takes ids and targets and gives losses; False: it gives logits.
    max_length, batch_size: sizes to fix in the program; None: any.
    The program is checked against the checkpoint before it is put in place; `output` is either
    whole or as it was. Raises CompilationError, QuantizationError, ModelError, UsageError, and
    CapabilityError for what no engine of this version can do.
    """
    if to == "gguf":
        precision = gguf_precision(
            quantization=quantization,
            dtype=dtype,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
        )
        return _compiled_to_gguf(model, Path(output), precision)
    _check_supported(to, dtype, device)
    shapes = _shapes(batch_size, max_length)
    recipe = recipe_for(quantization, engine=to) if quantization is not None else None
    folder = Path(output)
    _check_replaceable(folder)
    load_checkpoint, build_program = _onnx_compiler()
    with _in_place_at_once(folder) as temporary:
        checkpoint = load_checkpoint(model)
        metadata = build_program(
            checkpoint, temporary, recipe=recipe, perplexity=perplexity, shapes=shapes
        )
    return CompiledProgram(folder, metadata)


def _compiled_to_gguf(model: str | Path, folder: Path, precision: str) -> CompiledProgram:
    """A GGUF file with its record; it holds weights, so the session computes the losses."""
    _check_replaceable(folder)
    load_checkpoint, build_program = _gguf_compiler()
    with _in_place_at_once(folder) as temporary:
        metadata = build_program(load_checkpoint(model), temporary, precision=precision)
        metadata.write(temporary)
    return CompiledProgram(folder, metadata)


def _check_supported(to: str, dtype: str | None, device: str) -> None:
    if to not in _TARGETS:
        raise CapabilityError(
            f"expected an engine that this version compiles to ({', '.join(_TARGETS)}), got {to!r}"
        )
    if canonical_dtype(dtype or "float32") != "float32":
        raise CapabilityError(
            f"expected dtype float32 for an ONNX program, got {dtype}; leave it out, or ask for "
            "smaller weights with a quantization (int8, int4)"
        )
    if device != "cpu":
        raise CapabilityError(
            f"an ONNX program is compiled and checked on the cpu, got device {device!r}; leave it "
            "out here, and name the device when the program is evaluated"
        )


def _shapes(batch_size: int | None, length: int | None) -> ProgramShapes:
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"expected a batch size of at least 1, got {batch_size}")
    if length is not None and length < 2:
        raise UsageError(
            f"expected a max_length of at least 2 (a target needs a token before it), got {length}"
        )
    num_targets = batch_size * (length - 1) if batch_size and length else None
    return ProgramShapes(batch_size, length, num_targets)


def _onnx_compiler() -> tuple[Callable[..., Any], Callable[..., ProgramMetadata]]:
    """The one lazy door to torch, transformers and the ONNX packages."""
    try:
        from perplexit.checkpoints.loading import load_checkpoint  # noqa: PLC0415
        from perplexit.compilation.onnx_build import build_onnx_program  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"compiling to ONNX needs {error.name}: pip install 'perplexit[onnx]'"
        ) from error
    return load_checkpoint, build_onnx_program


def _gguf_compiler() -> tuple[Callable[..., Any], Callable[..., ProgramMetadata]]:
    """The lazy door to torch, transformers, gguf and llama.cpp."""
    try:
        from perplexit.checkpoints.loading import load_checkpoint  # noqa: PLC0415
        from perplexit.compilation.gguf_build import build_gguf_program  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"compiling to GGUF needs {error.name}: pip install 'perplexit[llamacpp]'"
        ) from error
    return load_checkpoint, build_gguf_program


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder / PROGRAM_FILE).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(
            f"expected a new folder or one with a compiled program, got {folder}, which holds "
            "something else; name another output"
        )


@contextmanager
def _in_place_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, put in its place when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private; a program is not a secret
    retired = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        if folder.exists():
            folder.rename(retired)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)

"""The engines that `compile` makes programs for: one entry each, and the one lazy door to them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from perplexit.declared_options import check_numbers
from perplexit.errors import CapabilityError, ModelError, UsageError, needing
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata, ProgramShapes
from perplexit.protected_outputs import Kind, OutputFolder, paths_among
from perplexit.quantization.precisions import Recipe, canonical_dtype, recipe_for


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What a program is to be; every target's builder gets one, already checked against its entry.

    perplexity: whether the head is inside. dtype: canonical. recipe: None where the weights stay
    as they are. shapes: None where any size is asked for. device: as the target names it.
    """

    perplexity: bool = True
    dtype: str = "float32"
    recipe: Recipe | None = None
    shapes: ProgramShapes = field(default_factory=ProgramShapes)
    device: str = "cpu"


Builder = Callable[[Any, Path, CompileRequest], ProgramMetadata]


@dataclass(frozen=True, slots=True)
class Target:
    """One engine that programs are made for; nothing of it is imported here.

    home:    `module:function` of its Builder: (checkpoint, folder, request) → the record.
    extra:   installs what that module imports. noun: what it makes, with its article.
    dtypes:  that a program can be made in; the first is the default. devices: likewise.
    fixed_shapes: whether sizes can be fixed in the program.
    dtype_or_quantization: whether the two are names for the same thing (a file's number type).
    """

    home: str
    extra: str
    noun: str
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    fixed_shapes: bool = True
    dtype_or_quantization: bool = False


TARGETS = {
    "onnx": Target(
        "perplexit.compilation.onnx_build:build_onnx_program",
        "onnx",
        "an ONNX program",
        dtypes=("float32", "float16"),
    ),
    "openvino": Target(
        "perplexit.compilation.openvino_build:build_openvino_program",
        "openvino",
        "an OpenVINO program",
    ),
    "tvm": Target(
        "perplexit.compilation.tvm_build:build_tvm_program",
        "tvm",
        "a TVM program",
        devices=("llvm", "cuda", "opencl", "vulkan"),
    ),
    "pt2": Target(
        "perplexit.compilation.pt2_build:build_pt2_program", "pytorch", "an AOTInductor program"
    ),
    "gguf": Target(
        "perplexit.compilation.gguf_file:build_gguf_program",
        "llamacpp",
        "a GGUF file",
        dtypes=("float32", "float16", "bfloat16"),
        fixed_shapes=False,
        dtype_or_quantization=True,
    ),
}


def target_of(to: str) -> Target:
    """Return the entry of an engine. Raises CapabilityError for one that is not compiled to."""
    if to not in TARGETS:
        raise CapabilityError(
            f"expected an engine that this version compiles to ({', '.join(TARGETS)}), got {to!r}"
        )
    return TARGETS[to]


def load_builder(to: str) -> tuple[Callable[..., Any], Builder]:
    """Import torch, transformers and the engine; return (`load_checkpoint`, the target's builder).

    Raises MissingPackageError with the command that installs what is missing.
    """
    target = target_of(to)
    module, _, name = target.home.partition(":")
    with needing(f"compiling to {to}", f"pip install 'perplexit[{target.extra}]'"):
        builder: Builder = getattr(import_module(module), name)
        loading = import_module("perplexit.checkpoints.loading")
    return loading.load_checkpoint, builder


def _dtype(target: Target, asked: str | None, quantization: str | None) -> str:
    if quantization is not None and asked is not None and target.dtype_or_quantization:
        raise CapabilityError(
            f"expected a quantization or a dtype for the matrices of {target.noun}, got both "
            f"({quantization} and {asked}); leave one out"
        )
    dtype = canonical_dtype(asked or target.dtypes[0])
    if dtype not in target.dtypes:
        raise CapabilityError(
            f"expected dtype {' or '.join(target.dtypes)} for {target.noun}, got {asked}; leave it "
            "out, or ask for smaller weights with a quantization"
        )
    if quantization is not None and dtype != target.dtypes[0]:
        raise CapabilityError(
            f"expected {target.noun} with quantized weights to compute in {target.dtypes[0]}, got "
            f"quantization {quantization} and dtype {asked}; leave one out"
        )
    return dtype


def _device(target: Target, asked: str | None) -> str:
    device = asked or target.devices[0]
    if device not in target.devices:
        raise CapabilityError(
            f"{target.noun} is compiled and checked on the {' or '.join(target.devices)}, got "
            f"device {device!r}; leave it out here, and name the device when the program is "
            "evaluated"
        )
    return device


def _shapes(target: Target, batch_size: int | None, length: int | None) -> ProgramShapes:
    if not target.fixed_shapes and (batch_size is not None or length is not None):
        raise CapabilityError(
            f"expected neither --max-length nor --batch-size for {target.noun}: it takes windows "
            "of any length; leave them out"
        )
    if length is not None and length < 2:
        raise UsageError(
            f"expected a max_length of at least 2 (a target needs a token before it), got {length}"
        )
    num_targets = batch_size * (length - 1) if batch_size and length else None
    return ProgramShapes(batch_size, length, num_targets)


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
    target = target_of(to)  # all is checked before anything heavy is imported
    request = CompileRequest(
        perplexity=perplexity,
        dtype=_dtype(target, dtype, quantization),
        recipe=recipe_for(quantization, engine=to) if quantization is not None else None,
        shapes=_shapes(target, batch_size, max_length),
        device=_device(target, device),
    )
    asked = json.loads(json.dumps({"to": to, **asdict(request)}))
    checkpoint = str(model).removeprefix("hf:")
    place = OutputFolder(Path(output), PROGRAM, paths_among(checkpoint), force)
    load_checkpoint, build_program = load_builder(to)
    if place.exists:
        find_checkpoint = import_module("perplexit.checkpoints.location").find_checkpoint
        fingerprint = find_checkpoint(model).fingerprint
        found = ProgramMetadata.read(place.path)
        same_weights = found.model.weights_fingerprint == fingerprint
        place.check_replaceable(same_weights and found.request == asked)
    with place.staged() as temporary:
        metadata = replace(build_program(load_checkpoint(model), temporary, request), request=asked)
        metadata.write(temporary)
    return CompiledProgram(place.path, metadata)


def _is_program(folder: Path) -> bool:
    """Return whether a folder holds a compiled program and nothing that somebody put beside it."""
    try:
        own = {file.name for file in ProgramMetadata.read(folder).files}
    except ModelError:
        return False
    return all(entry.name in own | {PROGRAM_FILE} for entry in folder.iterdir())


PROGRAM = Kind("a compiled program", _is_program)

"""The header of a GGUF file: architecture, tensor types and their bytes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader, LlamaFileType

from perplexit.errors import ModelError
from perplexit.inputs.gguf_header_check import check_gguf
from perplexit.program_record import ProgramQuantization
from perplexit.untrusted_files import Expected, stated

_EXPECTED = Expected("a GGUF file", ModelError, "download or compile it again")
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file.

    tensor_types: how many tensors have each type, by GGUF's name for it.
    matrix_dtype: the narrowest floating-point type among the matrices that are not quantized;
        llama.cpp rounds activations to it when it multiplies with them.
    quantization: counted over the file's tensors; bits are those of the whole file.
    rope_border: of a LongRoPE, the longest context with the short factors; None without one.
    """

    architecture: str
    num_parameters: int
    tensor_types: dict[str, int]
    matrix_dtype: str
    quantization: ProgramQuantization | None
    rope_border: int | None = None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of the GGUF file at `path`. Raises ModelError where it is none."""
    check_gguf(path, _EXPECTED)
    with stated(path, _EXPECTED):
        return _header_of(GGUFReader(path))


def _header_of(reader: GGUFReader) -> GgufHeader:
    counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    num_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    field = reader.fields.get("general.architecture")
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    narrow = "bfloat16" if "BF16" in matrices else "float16" if "F16" in matrices else "float32"
    return GgufHeader(
        architecture=str(field.contents()) if field else "unknown",
        num_parameters=num_parameters,
        tensor_types=dict(sorted(counts.items())),
        matrix_dtype=narrow,
        quantization=_quantization(reader, num_parameters),
        rope_border=_rope_border(reader),
    )


def _rope_border(reader: GGUFReader) -> int | None:
    """Return the border that llama.cpp uses: the trained context where no original is given."""
    if not any("rope_factors_long" in tensor.name for tensor in reader.tensors):
        return None
    for name in (".rope.scaling.original_context_length", ".context_length"):
        for key, field in reader.fields.items():
            if key.endswith(name):
                return int(field.contents())
    return None


def _quantization(reader: GGUFReader, num_parameters: int) -> ProgramQuantization | None:
    quantized = [x for x in reader.tensors if x.tensor_type.name not in _FLOATS]
    if not quantized:
        return None
    left = [x for x in reader.tensors if x.tensor_type.name in _FLOATS and len(x.shape) > 1]
    num_bytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    return ProgramQuantization(
        name=_file_type_name(reader) or quantized[0].tensor_type.name.lower(),
        library="llama.cpp",
        num_modules=len(quantized),
        num_bytes=sum(int(tensor.n_bytes) for tensor in quantized),
        effective_bits=8 * num_bytes / num_parameters,
        unquantized=tuple(tensor.name for tensor in left),
    )


def _file_type_name(reader: GGUFReader) -> str | None:
    field = reader.fields.get("general.file_type")
    if field is None:
        return None
    try:
        name = LlamaFileType(int(field.contents())).name
    except ValueError:
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_").removesuffix("_MOE").lower()

"""GGUF precision names, and llama.cpp's own quantizer."""

import os
from pathlib import Path

import llama_cpp

from perplexit.atomic_files import cache_folder
from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.errors import QuantizationError
from perplexit.quantization.gguf_header import read_gguf_header
from perplexit.quantization.llamacpp_library import last_words, library_log
from perplexit.quantization.precisions import canonical_precision

# precision -> llama.cpp's name of the file type; those that need an importance matrix are left out
FILE_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "bfloat16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q5_k_s": "MOSTLY_Q5_K_S",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q4_k_s": "MOSTLY_Q4_K_S",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
    "iq4_nl": "MOSTLY_IQ4_NL",
    "iq4_xs": "MOSTLY_IQ4_XS",
    "q3_k_l": "MOSTLY_Q3_K_L",
    "q3_k_m": "MOSTLY_Q3_K_M",
    "q3_k_s": "MOSTLY_Q3_K_S",
    "q2_k": "MOSTLY_Q2_K",
}

_SYNONYMS = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16"} | {
    "bf16": "bfloat16"
}


def file_type_number(precision: str) -> int:
    """Return llama.cpp's number of a file type, `q4_k_m` → 15.

    Raises QuantizationError that lists the names.
    """
    name = _SYNONYMS.get(canonical_precision(precision), canonical_precision(precision))
    if name not in FILE_TYPES:
        raise QuantizationError(
            f"expected a GGUF type that llama.cpp's quantizer makes: {', '.join(FILE_TYPES)}; "
            f"got {precision!r}"
        )
    return int(getattr(llama_cpp, f"LLAMA_FTYPE_{FILE_TYPES[name]}"))


def quantize_gguf(
    source: Path, target: Path, precision: str, *, threads: int | None = None
) -> Path:
    """Write `target` with llama.cpp's quantizer from the GGUF file `source`; return it.

    A source that is quantized already is dequantized first; what it lost stays lost. Written
    under another name and moved, so that `target` is whole where it exists. Raises
    QuantizationError with llama.cpp's last words.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = file_type_number(precision)
    options.nthread = threads or os.cpu_count() or 1
    options.allow_requantize = True
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with library_log() as log:
            code = llama_cpp.llama_model_quantize(bytes(source), bytes(partial), options)
            if code != 0:
                raise QuantizationError(
                    f"llama.cpp could not make {precision} from {source}: {last_words(log)}"
                )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def requantized_gguf(source: Path, precision: str | None, *, threads: int | None = None) -> Path:
    """Return `source` in another precision, made once and cached; `source` itself for None.

    Raises QuantizationError where nothing was quantized, or where the name is unknown.
    """
    if precision is None:
        return source
    file_type_number(precision)
    name = canonical_precision(precision)
    already = read_gguf_header(source).quantization
    if already is not None and already.name == name:
        return source
    made_by = f"llama-cpp-python-{llama_cpp.__version__}"
    target = cache_folder() / "gguf" / f"{weights_fingerprint(source)[:32]}-{name}-{made_by}.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        quantize_gguf(source, target, name, threads=threads)
    header = read_gguf_header(target)
    if header.quantization is None and name not in ("float32", "float16", "bfloat16"):
        target.unlink()
        raise QuantizationError(
            f"llama.cpp quantized none of the tensors of {source} to {precision}: their rows are "
            "no multiple of its blocks"
        )
    return target

"""A checkpoint → a folder with `model.gguf` and its record, checked with llama.cpp."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.gguf_tensors import architecture_of, gguf_tensors
from perplexit.compilation.gguf_vocabulary import add_vocabulary
from perplexit.compilation.program_build import IN_FLOAT32, ProgramBuild, window_nll
from perplexit.compilation.targets import CompileRequest
from perplexit.errors import CompilationError, QuantizationError
from perplexit.program_record import (
    ProgramMemory,
    ProgramMetadata,
    ProgramQuantization,
    ProgramShapes,
    ProgramVerification,
)
from perplexit.quantization.gguf_header import GgufHeader, read_gguf_header
from perplexit.quantization.llamacpp_library import last_words, library_log, quantize_gguf

# precision -> (type of the matrices, type of the file) that the gguf package writes itself
WRITTEN_TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "mxfp4": (GGMLQuantizationType.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
}
# Looked up or added, never multiplied: a few rows, and llama.cpp wants them as floats.
_KEPT_FLOAT = ("position_embd.weight", "rope_freqs.weight")

GGUF_FILE = "model.gguf"
_NUM_IDS = 64
# Nats a token. llama.cpp multiplies float16 and bfloat16 matrices with activations rounded to
# them, and looks GPT-2's GELU up in a table of 16-bit floats.
_TOLERANCES = {"float32": 1e-2, "float16": 0.1, "bfloat16": 1.0}
# In the mean, of a quantized file: 4 bits cost up to 1.3 nats on random ids (mxfp4, SmolLM2-135M),
# a file of noise costs tens.
_MEAN_TOLERANCE = 4.0


def build_gguf_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Write a GGUF file into `folder`, in the recipe's type or `dtype`, and return its record.

    A GGUF file holds weights, so the losses are the session's whatever `perplexity` says.

    A float32 file comes first and is checked against the checkpoint; then the quantized one
    is written by the gguf package, or (K-quants) made by llama.cpp's quantizer. A checkpoint that
    is a GGUF file is requantized by llama.cpp from that file.
    Raises CompilationError where llama.cpp's losses are not the checkpoint's, QuantizationError.
    """
    precision = request.recipe.precision if request.recipe else request.dtype
    path = folder / GGUF_FILE
    model: Any = checkpoint.model
    source = checkpoint.source
    ids = _probe_ids(model.config)
    reference = window_nll(model, ids)
    if precision not in _TOLERANCES and source.original.suffix == ".gguf":
        quantize_gguf(source.original, path, precision)
    elif precision in _TOLERANCES:
        _write(checkpoint, path, precision)
    else:
        plain = _write(checkpoint, folder / "float32.gguf", "float32")
        _check(llamacpp_nll(plain, ids), reference, "float32")
        if precision in WRITTEN_TYPES:
            _write(checkpoint, path, precision)
        else:
            quantize_gguf(plain, path, precision)
        plain.unlink()
    difference = _check(llamacpp_nll(path, ids), reference, precision)
    header = read_gguf_header(path)
    logits = replace(request, perplexity=False)
    record = ProgramBuild("gguf", checkpoint, logits, ProgramShapes(), ()).record(
        folder,
        ProgramVerification(IN_FLOAT32, len(ids) - 1, difference),
        dtype=header.matrix_dtype,
        memory=ProgramMemory(bytes_per_id=0, bytes_per_id_pair=0),
        quantization=_quantization(header, precision),
    )
    return replace(record, made_by={"llama-cpp-python": llama_cpp.__version__})


def _write(checkpoint: Checkpoint, path: Path, precision: str) -> Path:
    model: Any = checkpoint.model
    tokenizer = checkpoint.source.folder / "tokenizer.json"
    return write_gguf(
        path,
        config=model.config.to_dict(),
        state=model.state_dict(),
        tokenizer_json=tokenizer if tokenizer.is_file() else None,
        precision=precision,
    )


def _probe_ids(config: Any) -> NDArray[np.int32]:
    length = min(_NUM_IDS, int(getattr(config, "max_position_embeddings", _NUM_IDS)))
    vocab_size = int(config.vocab_size)
    return np.random.default_rng(0).integers(0, vocab_size, length).astype(np.int32)


def _check(nll: NDArray[np.float64], reference: NDArray[np.float64], precision: str) -> float:
    """Return the largest difference, in nats. Raises CompilationError where it is too large."""
    difference = float(np.abs(nll - reference).max())
    mean = float(abs((nll - reference).mean()))
    if not (difference <= _TOLERANCES.get(precision, np.inf) and mean <= _MEAN_TOLERANCE):
        raise CompilationError(
            f"expected llama.cpp to give the checkpoint's losses from the {precision} file, got "
            f"{difference:.3g} nats a token apart at most and {mean:.3g} in the mean; the "
            "checkpoint has a part that GGUF does not carry: evaluate it with hf: instead"
        )
    return difference


def _quantization(header: GgufHeader, precision: str) -> ProgramQuantization | None:
    found = header.quantization
    if precision in _TOLERANCES:
        return None
    if found is None:
        raise QuantizationError(
            f"none of the model's matrices could be quantized to {precision}: their rows are no "
            "multiple of its blocks; choose float16 or q8_0"
        )
    return replace(
        found,
        name=precision,
        library="gguf" if precision in WRITTEN_TYPES else "llama.cpp",
        settings={"tensor_types": header.tensor_types},
    )


def write_gguf(
    path: Path,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    tokenizer_json: Path | None,
    precision: str = "float32",
) -> Path:
    """Write the checkpoint to `path` as GGUF with its matrices in `precision` (WRITTEN_TYPES).

    Vectors stay float32, and so do matrices whose rows are no multiple of the type's block.
    Raises CompilationError for a checkpoint with no form in GGUF, QuantizationError where no
    matrix could take the precision.
    """
    matrix_type, file_type = WRITTEN_TYPES[precision]
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture.arch])
    num_matrices = 0
    try:
        architecture.add_hyperparameters(writer, config)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer_json, config)
        for name, array in gguf_tensors(architecture, config, state):
            stored = _stored_type(name, array, matrix_type)
            num_matrices += stored == matrix_type and array.ndim > 1
            packed = gguf.quants.quantize(array, stored)
            writer.add_tensor(name, packed, raw_dtype=stored)
        if num_matrices == 0:
            raise QuantizationError(
                f"no matrix of this model can be {precision}: its rows are no multiple of the "
                f"block of {gguf.GGML_QUANT_SIZES[matrix_type][0]}; choose float16 or float32"
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return path


def llamacpp_nll(path: Path, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the nll of `ids[1:]` that llama.cpp computes from the file, in nats, to verify it.

    Raises CompilationError where llama.cpp cannot load the file.
    """
    with library_log() as log:
        try:
            model = llama_cpp.Llama(
                str(path),
                n_ctx=len(ids),
                n_batch=len(ids),
                logits_all=True,
                type_k=0,
                type_v=0,
                flash_attn=False,
                verbose=True,  # or it would take the log from us, and its reason with it
            )
        except (ValueError, RuntimeError) as error:
            raise CompilationError(
                f"expected llama.cpp to load the GGUF file made of this checkpoint, but it did "
                f"not: {last_words(log)} ({error}). Evaluate the checkpoint with hf: instead"
            ) from error
    try:
        model.eval(ids.tolist())
        logits_TV = np.asarray(model.scores[: len(ids) - 1], dtype=np.float64)
    finally:
        model.close()
    largest_T1 = logits_TV.max(-1, keepdims=True)
    log_sum_T = largest_T1[:, 0] + np.log(np.exp(logits_TV - largest_T1).sum(-1))
    return np.asarray(log_sum_T - logits_TV[np.arange(len(ids) - 1), ids[1:]])


def _stored_type(
    name: str, array: NDArray[np.float32], matrix_type: GGMLQuantizationType
) -> GGMLQuantizationType:
    if array.ndim < 2 or name in _KEPT_FLOAT:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    return matrix_type if array.shape[-1] % block == 0 else GGMLQuantizationType.F32

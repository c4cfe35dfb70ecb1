"""One GGUF file written from a checkpoint, and what llama.cpp makes of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from perplexit.compilation.gguf_tensors import architecture_of, gguf_tensors
from perplexit.compilation.gguf_vocabulary import add_vocabulary
from perplexit.errors import CompilationError, QuantizationError
from perplexit.quantization.llamacpp_library import last_words, library_log

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

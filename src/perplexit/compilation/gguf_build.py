"""A checkpoint → a folder with `model.gguf` and its record, checked against the checkpoint."""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import describe_model
from perplexit.compilation.gguf_file import WRITTEN_TYPES, llamacpp_nll, write_gguf
from perplexit.compilation.loss_check import window_nll
from perplexit.compilation.targets import CompileRequest
from perplexit.errors import CompilationError, QuantizationError
from perplexit.program_record import (
    ProgramMemory,
    ProgramMetadata,
    ProgramQuantization,
    ProgramShapes,
    ProgramVerification,
    files_of,
)
from perplexit.quantization.gguf_header import GgufHeader, read_gguf_header
from perplexit.quantization.gguf_quantizer import quantize_gguf

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

    A float32 file comes first and is held to the checkpoint's losses; then the quantized one
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
    return ProgramMetadata(
        engine="gguf",
        perplexity=False,
        dtype=header.matrix_dtype,
        opset=0,
        shapes=ProgramShapes(),
        model=describe_model(model, address=source.address, fingerprint=source.fingerprint),
        memory=ProgramMemory(bytes_per_id=0, bytes_per_id_pair=0),
        verification=ProgramVerification(
            reference="the checkpoint in PyTorch float32",
            num_tokens=len(ids) - 1,
            max_abs_nll_difference=difference,
        ),
        files=files_of(folder),
        quantization=_quantization(header, precision),
        made_by={"llama-cpp-python": llama_cpp.__version__},
    )


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
    """Return the largest difference a token. Raises CompilationError where it is too large."""
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
    return ProgramQuantization(
        name=precision,
        library="gguf" if precision in WRITTEN_TYPES else "llama.cpp",
        num_modules=found.num_tensors,
        num_bytes=found.num_bytes,
        effective_bits=found.effective_bits,
        unquantized=found.unquantized,
        settings={"tensor_types": header.tensor_types},
    )

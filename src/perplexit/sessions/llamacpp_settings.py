"""What llama.cpp is given and what it says is in effect: file, device, settings, tokenizer."""

import re
from pathlib import Path
from typing import Any

import llama_cpp

from perplexit.errors import CapabilityError, ModelError, TokenizerError
from perplexit.program_record import PROGRAM_FILE, ProgramMetadata
from perplexit.quantization.precisions import canonical_dtype


def effective_settings(context_log: list[str]) -> dict[str, str]:
    """Read the cache's dtype and whether flash attention is in effect from llama.cpp's log."""
    kv_type = logged_setting(context_log, r"K \((\w+)\)")
    return {
        "kv_cache": canonical_dtype(kv_type) if kv_type else "none (no KV cache)",
        "flash_attention": logged_setting(context_log, r"flash_attn += (\w+)") or "unknown",
    }


def logged_setting(log: list[str], pattern: str) -> str | None:
    """Return the first group of `pattern` in what llama.cpp logged; None where it says nothing."""
    found = re.search(pattern, "".join(log))
    return found.group(1) if found else None


def model_file(path: Path) -> Path:
    """Return the GGUF file at `path`, or in the folder `path`.

    Raises ModelError where there is none, or where a record beside it is of another file.
    """
    file = path / "model.gguf" if path.is_dir() else path
    if not file.is_file():
        hint = " (a folder needs a model.gguf; make one with: perplexit compile --to gguf)"
        raise ModelError(
            f"expected a GGUF file, found none at {file}{hint if path.is_dir() else ''}"
        )
    if path.is_dir() and (path / PROGRAM_FILE).is_file():
        ProgramMetadata.read(path, engine="gguf").check_files(path)
    return file


def checked_device(device: str | None) -> str:
    """Return the device's name; cpu by default. Raises CapabilityError if this build lacks it."""
    name = (device or "cpu").lower()
    if name != "cpu" and not llama_cpp.llama_supports_gpu_offload():
        raise CapabilityError(
            f"expected device cpu: this build of llama.cpp cannot offload to {device!r}; "
            "reinstall llama-cpp-python with CMAKE_ARGS for that backend"
        )
    return name


def own_token_ids(model: Any, text: str, *, special: bool) -> list[int]:
    """Return the ids of `text` by llama.cpp's tokenizer of a loaded model; see TokenizesText.

    Raises TokenizerError where the file holds no vocabulary to tokenise with.
    """
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise TokenizerError("expected a GGUF file with a vocabulary, got one without")
    data = text.encode("utf-8")
    size = len(data) + 8  # a token is at least a byte, and a few special ones are added
    ids = (llama_cpp.llama_token * size)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, size, special, True)
    if count < 0:
        raise TokenizerError(f"llama.cpp could not tokenise a text of {len(data)} bytes")
    return list(ids[:count])
